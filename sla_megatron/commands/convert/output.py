"""A result folder that appears under its name only when it is complete, and takes no place but its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...common.replacing import foreign_content, remove_made, replaced_input, unused_name, write_manifest
from .errors import ConvertError


@contextmanager
def finished_folder(out: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Within the block, an empty folder beside ``out``; at its end that is ``out``, after an error it is gone.

    A process that is killed leaves the unfinished folder, named ``.<out>.unfinished-...``, and ``out`` as it was.  An
    ``out`` that is replaced goes when the new one is in its place.

    Args:
        out: the folder; where it is a link, the folder that it leads to.
        overwrite: whether an earlier result may be replaced.
        inputs: what is read: it is never replaced.

    Raises:
        ConvertError: if ``out`` exists and may not be replaced, or for what the file system refuses.
    """
    inputs = list(inputs)
    require_free(out, overwrite, inputs)
    place = Path(os.path.realpath(out))
    unfinished = unused_name(place, "unfinished")
    try:
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            write_manifest(unfinished)
            # It may have taken hours.
            require_free(out, overwrite, inputs)
            _put(unfinished, place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise ConvertError(f"{out} cannot be written: {error}") from error


def _put(unfinished: Path, place: Path) -> None:
    """Give ``unfinished`` its name; an earlier result that has it is removed then."""
    if not place.exists():
        unfinished.rename(place)
        return
    replaced = unused_name(place, "replaced")
    place.rename(replaced)
    try:
        unfinished.rename(place)
    except OSError:
        replaced.rename(place)
        raise
    remove_made(replaced)


def require_free(out: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Raise ``ConvertError`` unless ``out`` is new, empty, or an earlier result that may be replaced.

    A file never may, nor what is read, nor a folder with anything in it that this command did not put there.
    """
    place = Path(os.path.realpath(out))
    if not place.exists():
        return
    if not place.is_dir():
        raise ConvertError(f"{out} exists: expected a new folder")
    if (read := replaced_input(out, inputs)) is not None:
        raise ConvertError(f"{out} holds what is read, {read}: expected another folder")
    if not any(place.iterdir()):
        return
    if (foreign := foreign_content(place)) is not None:
        raise ConvertError(f"{out} exists, and {foreign}: expected a new folder")
    if not overwrite:
        raise ConvertError(f"{out} exists: expected a new folder, or --overwrite")
