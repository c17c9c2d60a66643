"""The logs of an attempt's ranks, in RUN/logs/JOB.RESTART.

torchrun's are NAME-NODE/ID/attempt_0/LOCAL RANK/std{out,err}.log there, each launch with an ID of its own; those of
ranks that srun starts NAME-NODE/STEP/LOCAL RANK/std{out,err}.log.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..chain import Attempt, Chain
from .steps import Step, first_step, last_step, printed_arguments

#: Files that are looked into for iterations and arguments: those are in the longest.
_MOST = 64


@dataclass(frozen=True)
class LogFile:
    path: Path
    #: Of the file below the attempt's folder.
    name: str
    bytes: int
    changed: float

    @property
    def local_rank(self) -> str:
        return self.path.parent.name

    @property
    def rank(self) -> str:
        """As one would look for it: ``local rank 0 on node1``, or the file's name where it is laid out otherwise."""
        laid_out = re.match(r"[^/]+?-([^/]+)/[^/]+/(?:attempt_\d+/)?(\d+)/", self.name)
        if laid_out:
            return f"local rank {laid_out[2]} on {laid_out[1]}"
        return self.name.rpartition("/std")[0] or self.name

    @property
    def launch(self) -> str:
        """What the files of one launch on one node have in common."""
        return "/".join(self.name.split("/")[:2])


class AttemptLogs:
    """What the ranks of one attempt printed.

    Args:
        folder: their job's, which need not be there.
        began: of the attempt, and of the next one that has the folder too, in seconds.
    """

    def __init__(self, folder: Path | None, began: tuple[float, float] = (-math.inf, math.inf)) -> None:
        self.folder, self.began = folder, began

    @cached_property
    def files(self) -> list[LogFile]:
        """The longest first."""
        found = [] if self.folder is None else _files(self.folder)
        if self.began != (-math.inf, math.inf):
            launched = {
                launch: min(file.changed for file in found if file.launch == launch)
                for launch in {file.launch for file in found}
            }
            found = [file for file in found if self.began[0] <= launched[file.launch] < self.began[1]]
        return sorted(found, key=lambda file: (-file.bytes, file.name))

    @cached_property
    def training(self) -> LogFile | None:
        """The file that iterations are logged to: the last rank's."""
        return next((file for file in self._longest if last_step(file.path)), None)

    @property
    def first(self) -> Step | None:
        return first_step(self.training.path) if self.training else None

    @property
    def last(self) -> Step | None:
        return last_step(self.training.path) if self.training else None

    @cached_property
    def arguments(self) -> dict[str, str]:
        """Megatron's, as the first rank printed them; empty if it did not."""
        return next((found for file in self._longest if (found := printed_arguments(file.path))), {})

    @property
    def _longest(self) -> list[LogFile]:
        return [file for file in self.files if file.bytes][:_MOST]


def logs_of(chain: Chain) -> list[AttemptLogs]:
    """The logs of each attempt.

    An attempt of before ``restart`` was noted is taken to have the job's folder of the same place in their order.
    """
    places = _folders(chain.folder / "logs")
    return [
        AttemptLogs(_folder(chain.attempts, number, places), _between(chain.attempts, number))
        for number in range(len(chain.attempts))
    ]


def _between(attempts: list[Attempt], number: int) -> tuple[float, float]:
    """When an attempt began and the next one of the same start of the job, which has the same folder of logs."""
    start = (attempts[number].job, attempts[number].restart)
    of_start = [
        place for place, one in enumerate(attempts) if (one.job, one.restart) == start and one.restart is not None
    ]
    at = of_start.index(number) if number in of_start else 0
    first, last = at == 0, at + 1 >= len(of_start)
    return (
        -math.inf if first else attempts[number].clock,
        math.inf if last else attempts[of_start[at + 1]].clock,
    )


def _folder(attempts: list[Attempt], number: int, places: dict[tuple[str, int], Path]) -> Path | None:
    attempt = attempts[number]
    if attempt.restart is not None:
        return places.get((attempt.job, attempt.restart))
    at = sum(one.job == attempt.job and one.restart is None for one in attempts[:number])
    # One that was excluded before it began has left no logs of ranks.
    folders = (path for (job, _), path in sorted(places.items()) if job == attempt.job and any(_entries(path)))
    return next(itertools.islice(folders, at, None), None)


def _folders(logs: Path) -> dict[tuple[str, int], Path]:
    try:
        names = [entry.name for entry in os.scandir(logs) if entry.is_dir()]
    except OSError:
        return {}
    split = [(name, *name.rpartition(".")[::2]) for name in names]
    return {(job, int(restart)): logs / name for name, job, restart in split if restart.isdecimal()}


def _files(folder: Path) -> list[LogFile]:
    return [
        LogFile(Path(entry.path), os.path.relpath(entry.path, folder), stat.st_size, stat.st_mtime)
        for entry in _entries(folder)
        for stat in [entry.stat()]
    ]


def _entries(folder: Path | str) -> Iterator[os.DirEntry]:
    """All files below ``folder`` but the doctor's."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if not entry.name.startswith("sla_megatron.commands."):
                yield from _entries(entry.path)
        elif entry.name.endswith((".log", ".out", ".err", ".txt")) and entry.is_file():
            yield entry
