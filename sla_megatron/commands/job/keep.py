"""``KEEP``: how many checkpoints of a run stay, and the space that they take."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from ...common.amounts import shown_size
from ...common.checkpoint_folders import aside
from ...common.errors import FlagError
from .chain import Chain
from .flags import TrainingFlags

_ACCEPTED = "how many of the newest checkpoints stay, such as 3, or 3,every=10000 for every 10000th iteration besides"

#: What a checkpoint is called while it is removed: cut off there, it is none.
_REMOVING = "removing"
_UNDER_WAY = re.compile(rf"{_REMOVING}_iter_\d+_\d{{8}}T\d{{6}}_\d+(_again)*")


@dataclass(frozen=True)
class Keep:
    """The ``newest`` checkpoints that were found whole stay, and those of every ``every``-th iteration."""

    newest: int
    every: int | None = None

    @classmethod
    def read(cls, text: str) -> Keep:
        """Raises FlagError for what is none."""
        found = re.fullmatch(r"([1-9]\d{0,8})(?:,(?:every=)?([1-9]\d{0,17}))?", text)
        if found is None:
            raise FlagError("--keep", text, _ACCEPTED)
        return cls(int(found[1]), int(found[2]) if found[2] else None)

    def __str__(self) -> str:
        return str(self.newest) + (f",every={self.every}" if self.every else "")

    def agree(self, flags: TrainingFlags) -> None:
        """Raises FlagError where Megatron's flags would have it otherwise."""
        if flags.save_retain_interval is not None:
            raise FlagError(
                "--keep",
                self,
                f"no --save-retain-interval {flags.save_retain_interval} beside it, by which Megatron removes the "
                f"checkpoint before the newest, looked into or not; --keep {self.newest},every="
                f"{flags.save_retain_interval} keeps as many and more",
            )
        if self.every is not None and flags.save_interval and self.every % flags.save_interval:
            raise FlagError("--keep", self, f"every= a multiple of --save-interval {flags.save_interval}")

    def surplus(self, whole: Iterable[int], others: Iterable[int]) -> list[int]:
        """The iterations that need not stay, the oldest first.

        Args:
            whole: of checkpoints that were looked into, and nothing found.
            others: of complete ones that were not looked into.  They count for nothing: what is newer than the last
                that stays of the others is left alone.
        """
        newest = sorted(whole, reverse=True)[: self.newest]
        if len(newest) < self.newest:
            return []
        older = (each for each in {*whole, *others} if each < newest[-1])
        return sorted(each for each in older if not (self.every and each % self.every == 0))


def written_by(chain: Chain, iteration: int) -> bool:
    """Whether an attempt of the chain wrote the checkpoint of ``iteration``."""
    return any(
        attempt.began_at < iteration and (attempt.ended is None or iteration <= (attempt.ended_at or 0))
        for attempt in chain.attempts
    )


def remove(path: Path, late: Callable[[], bool]) -> bool:
    """Remove a checkpoint, under another name first; False if it was cut short, as ``late`` asks it to be."""
    return _remove_files(path.with_name(aside(path, _REMOVING)), late)


def remove_rest(save: Path, late: Callable[[], bool]) -> None:
    """What was left of those whose removal was cut short."""
    for path in sorted(save.glob(f"{_REMOVING}_iter_*")):
        if _UNDER_WAY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _remove_files(path, late)


def _remove_files(folder: Path, late: Callable[[], bool]) -> bool:
    for file in sorted(folder.iterdir()):
        if late():
            return False
        if file.is_file() or file.is_symlink():
            file.unlink()
    shutil.rmtree(folder)
    return True


def space_warning(
    keep: Keep | None, flags: TrainingFlags, there: Collection[int], last: int | None, each: int
) -> str | None:
    """A line where the disk of ``--save`` will not hold the checkpoints to come; None where it will.

    Args:
        keep: None leaves it to Megatron.
        flags: of the run.
        there: the iterations of those that are there.
        last: iteration of the run; None where it is not known.
        each: bytes of a checkpoint.
    """
    newest, step = max(there, default=0), flags.save_interval
    coming = range((newest // step + 1) * step, last + 1, step) if step and last else ()
    saved = {*there, *coming, *([last] if last else [])}
    count, what = len(saved), f"until iteration {last}, without KEEP"
    retained = flags.save_retain_interval
    if keep is not None or retained:
        name = f"KEEP={keep}" if keep else f"--save-retain-interval {retained}"
        keep = keep or Keep(1, retained)
        often = sum(each % keep.every == 0 for each in sorted(saved)[: -keep.newest]) if keep.every else 0
        more = f", {often} of every {keep.every}th iteration" if keep.every else ""
        count, what = keep.newest + often + 1, f"with {name} ({keep.newest} newest, 1 being written{more})"
    free = shutil.disk_usage(flags.save).free
    if (count - len(there)) * each <= free:
        return None
    sizes = f"{shown_size(each)} each, take {shown_size(count * each)}"
    return (
        f"{flags.save} will be full: {count} checkpoints {what}, {sizes}; {len(there)} are there, and "
        f"{shown_size(free)} are free"
    )
