"""Commands of this project in a page: in fenced blocks, and in code within a line."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .markdown import markdown_files, pieces

#: What parts two commands on a line.
_PARTING = re.compile(r"[;&|()<>]+")
_ASSIGNMENT = re.compile("[A-Z_]+=")
_SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")


@dataclass(frozen=True)
class Command:
    """One command: where it stands, and its words without the variables set before it.

    ``is_typed``: by a reader; else it may be part of what a command prints.
    """

    place: str
    words: tuple[str, ...]
    is_typed: bool


def documented_commands(root: Path) -> Iterator[Command]:
    """Of every markdown file of ``root``, but for those that say what an earlier version had."""
    for page in markdown_files(root):
        if page.is_relative_to(root / "tests" / "data") or page == root / "CHANGELOG.md":
            continue
        for piece in pieces(page.read_text()):
            if piece.kind == "code" or (piece.kind.startswith("```") and piece.kind != "```python"):
                is_typed = piece.kind in ("code", "```sh", "```bash")
                for place, words in commands(piece.text, piece.line):
                    yield Command(f"{page.relative_to(root)}:{place}", words, is_typed)


def commands(text: str, line: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and words of each in ``text``, shell or what a shell printed, which begins on ``line``."""
    for whole in re.findall(r"(?:[^\\\n]|\\.|\\\n)*\n?", text):
        joined = whole.replace("\\\n", " ")
        for part in (*_SUBSTITUTION.findall(joined), _SUBSTITUTION.sub("SUBSTITUTED", joined)):
            yield from ((line, words) for words in _parted(part))
        line += whole.count("\n")


def _parted(line: str) -> Iterator[tuple[str, ...]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        words = list(lexer)
    except ValueError:
        # What was printed has quotes as prose has them.
        words = line.split()
    for is_end, run in itertools.groupby(words, lambda word: _PARTING.fullmatch(word) is not None):
        if not is_end and (command := tuple(itertools.dropwhile(_ASSIGNMENT.match, run))):
            yield command
