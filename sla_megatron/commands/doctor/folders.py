"""Folders that the job will write to: tried out by a file that is made and removed, so that nothing is left behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .finding import Fault


def nearest_existing(folder: Path) -> Path:
    """``folder``, or its nearest parent that is there.

    Raises:
        Fault: if that is not a folder, or may not be looked into.
    """
    folder = folder.absolute()
    for path in (folder, *folder.parents):
        try:
            if path.is_dir():
                return path
            if path.exists():
                raise Fault(f"{folder}: {path} is a file: expected a folder")
        except PermissionError as error:
            raise Fault(f"{folder}: {error.strerror}: expected a folder that this user may write to") from error
    raise Fault(f"{folder}: expected a folder on a file system that is there")


@contextmanager
def probe_file(folder: Path, content: str = "") -> Iterator[Path]:
    """A file in ``folder`` for the length of the block.  Raises ``OSError`` where it cannot be made."""
    descriptor, name = tempfile.mkstemp(prefix=".sla-doctor-", dir=folder)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # Other nodes may map this user to another.
        os.chmod(name, 0o644)
        yield Path(name)
    finally:
        os.unlink(name)


def require_writable(folder: Path, what: str) -> str:
    """A file can be made where ``folder`` is or will be; returns how to say that it is not there yet.

    Raises:
        Fault: with ``what``, the folder and the reason.
    """
    existing = nearest_existing(folder)
    try:
        with probe_file(existing, "x"):
            pass
    except OSError as error:
        place = folder if existing == folder.absolute() else f"{folder} (to be made in {existing})"
        raise Fault(f"{what} {place}: {error.strerror}: expected a folder that this user can write to") from error
    return "" if existing == folder.absolute() else f" (to be made in {existing})"
