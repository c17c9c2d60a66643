"""Files that are there whole or not at all.  Only the standard library is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .replacing import replaced_input, unused_name


def fault_of_file(path: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> str | None:
    """What would have to be so for a command that reads ``inputs`` to write ``path``; ``None`` if it may."""
    if path.is_dir() or not path.parent.is_dir():
        return "a file in a directory that exists"
    if (read := replaced_input(path, inputs)) is not None:
        return f"another file, {read} is read"
    return "a new file, or --overwrite beside it" if os.path.lexists(path) and not overwrite else None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Within the block, a name beside ``path`` to write to; at its end that is ``path``, after an error it is gone."""
    unfinished = unused_name(path, "unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write ``content`` so that ``path`` is the old file or the whole new one; ``durable``: after a power cut too."""
    with written_whole(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            flush(unfinished)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """:func:`write_whole` of ``value``, durable."""
    write_whole(path, json.dumps(value, indent=1) + "\n", durable=True)


def read_json(path: Path) -> Any | None:
    """What :func:`write_json` wrote; ``None`` without the file.

    Raises ``OSError`` or ``ValueError`` where there is one that cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def flush(path: Path) -> None:
    """Have what was written to ``path`` on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
