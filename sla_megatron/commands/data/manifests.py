"""``PREFIX.json``: what ``sla-data`` writes about a finished data set, and how it is told from any other file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

#: How a manifest begins: a corpus of JSON need not be read to be told.
_BEGINNING = re.compile(rb'\s*\{\s*"settings"\s*:\s*\{')
#: How the settings begin that unfinished work was begun with.
_WORK_BEGINNING = re.compile(rb'\s*\{\s*"inputs"\s*:\s*\{')
#: How the name of a folder of unfinished work ends.
WORK_FOLDER = ".sla-data"
#: What ``--split`` divides a corpus into.
SPLITS = ("train", "valid", "test")
_KEYS = {"settings", "outputs", "documents", "tokens"}


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest in ``path``; None where there is none: no file, or one that is anything else."""
    try:
        if not _begins(path, _BEGINNING):
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sound = isinstance(content, dict) and _KEYS <= content.keys() and isinstance(content["outputs"], dict)
    return content if sound and all(_is_output(one) for one in content["outputs"].values()) else None


def _is_output(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("prefix"), str) and Path(one["prefix"]).name == one["prefix"]


def _begins(path: Path, beginning: re.Pattern[bytes]) -> bool:
    with path.open("rb") as file:
        return beginning.match(file.read(64)) is not None


def made_by_sla_data(path: Path) -> bool:
    """Whether ``path`` is no text but a manifest, or part of unfinished work, which may lie beside a corpus."""
    if any(folder.name.endswith(WORK_FOLDER) and is_work_folder(folder) for folder in path.parents):
        return True
    return path.suffix == ".json" and read_manifest(path) is not None


def is_work_folder(folder: Path) -> bool:
    """Whether ``folder`` holds a job's unfinished work."""
    try:
        return _begins(folder / "settings.json", _WORK_BEGINNING)
    except OSError:
        return False
