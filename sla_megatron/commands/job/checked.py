"""Which checkpoints were looked into, and what was found: ``checked.json`` in the run's folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ...common.checkpoint_folders import aside, checkpoints, problem
from ...common.files import read_json, write_json

FILE = "checked.json"


@dataclass(frozen=True)
class Look:
    """What was found in a checkpoint whose files were as ``fingerprint`` says; ``damage`` None: nothing.

    ``whole`` is when nothing was found last, as the files were then.
    """

    fingerprint: str
    damage: str | None
    when: str
    whole: str | None = None


@dataclass
class Checked:
    """The looks of the run in ``folder``, by the name of a checkpoint's folder.

    A file that is missing or cannot be read is as if none had been: a look can be had again.
    """

    folder: Path

    def looks(self) -> dict[str, Look]:
        try:
            stored = read_json(self.folder / FILE) or {}
            return {name: Look(**look) for name, look in stored["checkpoints"].items()} if stored else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def look(self, path: Path) -> Look | None:
        """The last one into a checkpoint as it is now."""
        known = self.looks().get(path.name)
        return known if known is not None and known.fingerprint == fingerprint(path) else None

    def damage(self, path: Path) -> str | None:
        """What is known to be wrong with a checkpoint as it is now."""
        known = self.look(path)
        return known.damage if known is not None else None

    def not_seen(self, save: Path) -> Path | None:
        """The newest checkpoint in ``save``, if others were looked into, and that one was not."""
        newest = next(iter(checkpoints(save).values()), None)
        return newest if newest is not None and self.looks() and self.look(newest) is None else None

    def note(self, path: Path, before: str, damage: str | None) -> None:
        """Remember what a look has found; ``before``: the fingerprint as it began.

        Others' entries stay, but for those of checkpoints that are gone.
        """
        there = {each.name for each in checkpoints(path.parent).values()} | {path.name}
        looks = {name: look for name, look in self.looks().items() if name in there}
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        earlier = looks[path.name].whole if path.name in looks else None
        looks[path.name] = Look(before, damage, now, now if damage is None else earlier)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / FILE, {"checkpoints": {name: asdict(look) for name, look in sorted(looks.items())}})


def fingerprint(path: Path) -> str:
    """Of the names, sizes and times of a checkpoint's files: another one where any was written anew."""
    files = sorted((file.name, *_size_and_time(file)) for file in path.iterdir() if file.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def _size_and_time(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def spoils(checked: Checked, source: Path, since: str) -> bool:
    """Whether training that began with the checkpoint ``source`` at the time ``since`` is of no use.

    Not where it was whole then, and has been damaged later.
    """
    look = checked.look(source)
    return look is not None and look.damage is not None and (look.whole is None or look.whole < since)


def known_damage(checked: Checked, save: Path, began_at: int, began: str) -> Callable[[Path], str | None]:
    """What is known against a complete checkpoint in ``save``: what a look has found, or what it was trained from.

    Args:
        checked: the looks.
        save: the folder.
        began_at: the iteration that the last attempt resumed from.  Newer ones are its own.
        began: when it did.
    """
    source = checkpoints(save).get(began_at)
    spoiled = source is not None and spoils(checked, source, began)

    def known(path: Path) -> str | None:
        if spoiled and int(path.name[5:]) > began_at:
            return f"it was trained from {source.name}, which is damaged"
        return checked.damage(path)

    return known


def set_aside_damaged(save: Path, known: Callable[[Path], str | None], say: Callable[[str], None]) -> None:
    """Rename complete checkpoints that something is known against; for when nothing trains there."""
    for path in checkpoints(save).values():
        if problem(path) is None and (reason := known(path)) is not None:
            say(f"{path} is damaged: {reason}; it is now {aside(path, 'damaged')}")
