"""``PREFIX.json``: what ``sla-data`` writes about a finished data set, and how it is told from any other file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...common.files import read_json

#: How a manifest begins: a corpus of JSON need not be read to be told.
_BEGINNING = re.compile(rb'\s*\{\s*"settings"\s*:\s*\{')
_KEYS = {"settings", "outputs", "documents", "tokens"}


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest in ``path``; None where there is none: no file, or one that is anything else."""
    try:
        with path.open("rb") as file:
            if not _BEGINNING.match(file.read(64)):
                return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sound = isinstance(content, dict) and _KEYS <= content.keys() and isinstance(content["outputs"], dict)
    return content if sound and all(_is_output(one) for one in content["outputs"].values()) else None


def _is_output(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("prefix"), str) and Path(one["prefix"]).name == one["prefix"]


def made_by_sla_data(path: Path) -> bool:
    """Whether ``path`` is no text but a manifest, or part of unfinished work: a folder may hold these beside a corpus."""
    if any(folder.name.endswith(WORK_FOLDER) and is_begun(folder) for folder in path.parents):
        return True
    return path.suffix == ".json" and read_manifest(path) is not None


#: How the name of a folder of unfinished work ends.
WORK_FOLDER = ".sla-data"


def begun_with(folder: Path) -> Any | None:
    """What the job whose unfinished work is in ``folder`` was begun with; None if there is none.

    Raises ``OSError`` or ``ValueError`` where that cannot be read.
    """
    content = read_json(folder / "settings.json")
    return content if isinstance(content, dict) and {"inputs", "tokenizer"} <= content.keys() else None


def is_begun(folder: Path) -> bool:
    """Whether ``folder`` holds unfinished work."""
    try:
        return begun_with(folder) is not None
    except (OSError, ValueError):
        return False
