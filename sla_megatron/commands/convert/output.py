"""A result folder that appears under its name only when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConvertError


@contextmanager
def finished_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Within the block, an empty folder beside ``out``; at its end that is ``out``, after an error it is gone.

    A process that is killed leaves the unfinished folder, named ``.<out>.unfinished-<pid>``, and no ``out``.

    Raises:
        ConvertError: if ``out`` exists and may not be replaced, or for what the file system refuses.
    """
    out = out.absolute()
    require_free(out, overwrite)
    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        replaced = None
        if out.exists():
            replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
            out.rename(replaced)
        unfinished.rename(out)
        if replaced is not None:
            shutil.rmtree(replaced)
    except OSError as error:
        raise ConvertError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def require_free(out: Path, overwrite: bool) -> None:
    """Raise ``ConvertError`` if ``out`` exists, unless it may be replaced; a file never may."""
    if out.exists() and not (overwrite and out.is_dir()):
        raise ConvertError(f"{out} exists: expected a new folder" + ("" if out.is_file() else ", or --overwrite"))
