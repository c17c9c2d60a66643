"""What a command may replace: never what it reads, and nothing that somebody else made.

A file that a flag names as the output is replaced with ``--overwrite``; what is written beside it, or a whole folder,
is replaced only where this project is known to have made it.  Only the standard library is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

#: In a folder that a command made: what it put there.
MANIFEST = "sla_convert.json"
_ENDS = 1 << 16
_OUTPUTS = ("--plot", "--draw", "--json", "--bad-nodes", "--save", "--tensorboard-dir")


def replaced_input(path: Path, inputs: Iterable[Path]) -> Path | None:
    """The first of ``inputs`` that would be lost if ``path`` were replaced; None if there is none.

    That is the same file or folder by any spelling of its name, one that lies in ``path`` or has its files there, and a
    folder that ``path``, a file, lies in.
    """
    if not os.path.lexists(path):
        return None
    real = Path(os.path.realpath(path))
    for given in inputs:
        read = Path(os.path.realpath(given))
        if not read.exists():
            continue
        if real == read or real in read.parents or file_identity(real) == file_identity(read):
            return given
        if not read.is_dir():
            continue
        if real.is_dir():
            if any(real in file.parents for file in _files_elsewhere(read)):
                return given
        elif read in real.parents:
            return given
    return None


def named_by_flags(argv: Iterable[str]) -> Iterator[Path]:
    """What the flags of a run name, and may be read: all words but those of flags that name outputs alone."""
    flag = ""
    for word in argv:
        name, _, value = word.partition("=")
        flag, value = (name, value) if word.startswith("--") else (flag, word)
        if value and flag not in _OUTPUTS:
            yield from (Path(f"{value}{suffix}") for suffix in ("", ".bin", ".idx"))


def file_identity(path: Path) -> tuple[int, int] | None:
    """The same for every name of a file or folder, links included; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _files_elsewhere(folder: Path) -> Iterator[Path]:
    """Where the links in ``folder`` lead."""
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (path := Path(at, name)).is_symlink():
                yield Path(os.path.realpath(path))


def unused_name(path: Path, what: str) -> Path:
    """A name beside ``path`` that nothing has: ``.<name>.<what>-<random>``."""
    while os.path.lexists(name := path.with_name(f".{path.name}.{what}-{os.getpid()}-{secrets.token_hex(4)}")):
        pass
    return name


def write_manifest(folder: Path) -> None:
    """Write down what is in ``folder``, so that it is known later as made by this project."""
    files = {str(path.relative_to(folder)): _fingerprint(path) for path in _contents(folder)}
    (folder / MANIFEST).write_text(json.dumps({"made_by": "sla-convert", "files": files}, indent=1) + "\n")


def foreign_content(folder: Path) -> str | None:
    """What in ``folder`` this project did not make, or what has been changed since; None if there is nothing."""
    listed = _listed(folder)
    for path in _contents(folder):
        name = str(path.relative_to(folder))
        if name == MANIFEST and listed:
            continue
        if name not in listed:
            return f"{path} was not made by sla-convert"
        if path.is_symlink() or not path.is_file() or _fingerprint(path) != listed[name]:
            return f"{path} was changed since sla-convert wrote it"
    return None


def remove_made(folder: Path) -> None:
    """Remove what :func:`write_manifest` wrote down, and the folders that are empty then; the manifest last."""
    listed = _listed(folder)
    for name in (*listed, MANIFEST):
        (folder / name).unlink(missing_ok=True)
    parents = {parent for name in listed for parent in (folder / name).parents if folder in parent.parents}
    for path in (*sorted(parents, reverse=True), folder):
        # What is not empty has something that came after the manifest, and stays.
        with contextlib.suppress(OSError):
            path.rmdir()


def _listed(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text()) if path.is_file() and not path.is_symlink() else None
    except (OSError, ValueError):
        return {}
    sound = isinstance(content, dict) and content.get("made_by") == "sla-convert"
    files = content.get("files") if sound else None
    # A name that leads out of the folder was not written here.
    inside = isinstance(files, dict) and not any(Path(name).is_absolute() or ".." in Path(name).parts for name in files)
    return files if inside else {}


def _contents(folder: Path) -> Iterator[Path]:
    """Every file, link, and folder without content."""
    for at, folders, files in os.walk(folder):
        links = [name for name in folders if Path(at, name).is_symlink()]
        yield from (Path(at, name) for name in (*files, *links))
        if not folders and not files and Path(at) != folder:
            yield Path(at)


def _fingerprint(path: Path) -> str:
    """Of size, beginning and end: another tool's weights of the same shapes differ in both."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_ENDS))
        file.seek(max(0, size - _ENDS))
        digest.update(file.read(_ENDS))
    return f"{size}:{digest.hexdigest()}"
