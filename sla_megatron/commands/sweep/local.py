"""All of a grid's runs on this machine, one after another."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...common.amounts import duration
from .errors import RunBusy, RunFailed
from .grid import Run
from .results_folder import SweepFolder
from .training import Launcher, Say, train
from .training_log import TrainingLog

#: Seconds between two lines of progress.
_EVERY = 10.0


def num_processes() -> int:
    """``NPROC``, or as launch/local.sh: the GPUs, or 2 without one."""
    given = os.environ.get("NPROC", "")
    if given.isdecimal() and int(given):
        return int(given)
    import torch

    return torch.cuda.device_count() or 2


@dataclass
class Progress:
    """Says now and then how far the run is, and when all will be done.

    Args:
        say: receives the lines.
        runs: all that there is to do.
        every: seconds between lines.
    """

    say: Say
    runs: Sequence[Run]
    every: float = _EVERY
    done: int = 0
    _began: float = field(default_factory=time.monotonic)
    _said: float = field(default_factory=time.monotonic)
    _gained: float = 0.0
    _last: tuple[str, int] = ("", 0)
    _from: dict[str, int] = field(default_factory=dict)

    def __call__(self, run: Run, log: TrainingLog) -> None:
        """A look at the log of the run that is going on."""
        now = (run.name, log.iteration)
        if not log.steps or now == self._last or time.monotonic() - self._said < self.every:
            return
        self._said, self._last = time.monotonic(), now
        self._from.setdefault(run.name, log.steps[0].first - 1)
        loss = log.steps[-1].loss
        self.say(
            f"[{self.done + 1}/{len(self.runs)}] {run.name}: iteration {log.iteration}/{run.iterations}, "
            f"loss {loss:.4f}; {self._left(run, log.iteration)}"
        )

    def finished(self, run: Run) -> str:
        """After a run: what is left."""
        self.done += 1
        self._gained += run.tokens * (1 - self._from.get(run.name, 0) / run.iterations)
        return self._left(None, 0)

    def _left(self, run: Run | None, iteration: int) -> str:
        """By tokens: runs of another size take another time, so that the figure is about right."""
        ahead = sum(one.tokens for one in self.runs[self.done :])
        gained = self._gained
        if run is not None:
            per_iteration = run.tokens / run.iterations
            ahead -= per_iteration * iteration
            gained += per_iteration * (iteration - self._from[run.name])
        if ahead <= 0:
            return "nothing left"
        # Starting takes as long as many iterations.
        if gained < 0.05 * self.runs[0].tokens:
            return "time left not known yet"
        return f"about {duration((time.monotonic() - self._began) * ahead / gained)} left of all"


def run_all(sweep: SweepFolder, runs: Sequence[Run], processes: int, say: Say) -> int:
    """Train all of ``runs`` that have no row; how many of them still have none.

    A run that fails is reported, and the others go on.  Raises KeyboardInterrupt once the run that is going on has
    ended after a SIGTERM, which it is told as well.
    """
    todo = [run for run in runs if not sweep.finished(run)]
    say(f"{len(runs) - len(todo)} of {len(runs)} runs are finished, {len(todo)} to do, {processes} processes each")
    progress = Progress(say, todo)
    faults: list[str] = []
    with _told_to_end() as told:
        for number, run in enumerate(todo, 1):
            fault = _train_one(sweep, run, f"[{number}/{len(todo)}] {run.name}", processes, say, progress)
            faults += [fault] if fault else []
            if told:
                raise KeyboardInterrupt
    if faults:
        say(f"{len(faults)} of {len(runs)} runs are not finished; the same command tries them again:")
        for fault in faults:
            say(f"  {fault}")
    return len(faults)


def _train_one(sweep: SweepFolder, run: Run, label: str, processes: int, say: Say, progress: Progress) -> str | None:
    """One run; why it has no row."""
    say(f"{label}: {run.iterations} iterations; log: {sweep.run(run).log}")
    try:
        row = train(sweep, run, Launcher.local(processes), say, progress)
    except (RunFailed, RunBusy) as fault:
        say(f"error: {fault}")
        progress.finished(run)
        return str(fault)
    say(
        f"{label}: validation loss {row['validation_loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s; "
        f"{progress.finished(run)}"
    )
    return None


@contextlib.contextmanager
def _told_to_end() -> Iterator[list[int]]:
    """Within the block a SIGTERM ends up in the list."""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
