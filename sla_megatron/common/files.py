"""Files that are there whole or not at all.  Only the standard library is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write ``content`` so that ``path`` is the old file or the whole new one; ``durable``: after a power cut too."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            flush(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


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
