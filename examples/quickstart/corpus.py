"""The quickstart's text: the Python standard library's own sources and docstrings, which every machine has.

One document is one source file. The order is a fixed shuffle, so that Megatron's --split, which cuts by
position, holds out files from all over the library rather than the end of the alphabet.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

# Not the library itself: its tests, installed packages, and two bundled applications' worth of fixtures.
SKIPPED_DIRS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
)
# Smaller files are mostly re-exports; a larger one would be a tenth of the text on its own.
FILE_BYTES = range(1024, 250_000)
# SentencePiece writes a space as this character, so text that contains it would not come back unchanged.
SPACE_MARK = "\u2581"


class CorpusError(RuntimeError):
    """This Python's standard library does not hold enough readable sources."""


def find_sources(root: Path) -> list[Path]:
    """The library's `.py` files under `root`, in an order that depends on their relative names alone."""

    def wanted(path: Path) -> bool:
        inside = path.relative_to(root)
        return not SKIPPED_DIRS.intersection(inside.parts) and path.stat().st_size in FILE_BYTES

    return shuffled(filter(wanted, root.rglob("*.py")), root)


def shuffled(files: Iterable[Path], root: Path) -> list[Path]:
    """`files` in an order that depends on their names relative to `root` alone."""
    return sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def read_documents(max_bytes: int, root: Path | None = None) -> list[str]:
    """Whole files in the fixed order until the next one would exceed `max_bytes` of UTF-8 text in total.

    `root` defaults to the running Python's standard library. Files that are not UTF-8 are left out.
    Raises CorpusError when fewer than 20 documents are found: too few to hold some out.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents, total = [], 0
    for path in find_sources(root):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if SPACE_MARK in text:
            continue
        if total + len(raw) > max_bytes:
            break
        documents.append(text)
        total += len(raw)
    if len(documents) < 20:
        raise CorpusError(f"only {len(documents)} readable source files within {max_bytes} bytes in {root}")
    return documents


def fingerprint(documents: Iterable[str]) -> str:
    """SHA-256 (hex) of the documents and of where each one ends."""
    digest = hashlib.sha256()
    for text in documents:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()
