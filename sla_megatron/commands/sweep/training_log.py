"""What a run's log says: losses, speed, parameters.  The log holds all launches of the run, each behind a mark."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from ...common.megatron_log import progress_line

#: Precedes the command line of each launch.
LAUNCH_MARK = "$ "

#: Log intervals at a run's end whose mean is its training loss.
LAST_INTERVALS = 10

_VALIDATION = re.compile(r"\bvalidation loss at iteration (\d+) on validation set \| lm loss value: (\S+)")
#: The same of ``--eval-interval``.
_DURING = re.compile(r"\bvalidation loss at iteration (\d+) \| lm loss value: (\S+)")
_PARAMETERS = re.compile(r"sla-megatron: (?:off; )?parameters (\d+)\b")
_WORLD_SIZE = re.compile(r"\busing world size: (\d+)")
_NO_GPU = "sla-megatron: no GPU:"


@dataclass(frozen=True)
class Step:
    """The iterations from ``first`` to ``last``: their mean loss, and the time of each in seconds.

    ``warm``: none of them is a launch's first, which sets things up.
    """

    first: int
    last: int
    loss: float
    seconds: float
    warm: bool


@dataclass
class TrainingLog:
    """What was read so far.

    ``validation`` and ``during``: the loss after an iteration, of the evaluation that ends a run, and of those in it.
    """

    steps: list[Step] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    during: dict[int, float] = field(default_factory=dict)
    parameters: int | None = None
    processes: int | None = None
    on_cpu: bool = False
    _of_launch: int = 0

    def read(self, line: str) -> None:
        """Take in one line."""
        if line.startswith(LAUNCH_MARK):
            self._of_launch = 0
        elif found := _PARAMETERS.search(line):
            self.parameters = int(found[1])
        elif found := _WORLD_SIZE.search(line):
            self.processes = int(found[1])
        elif _NO_GPU in line:
            self.on_cpu = True
        elif found := _VALIDATION.search(line):
            self.validation[int(found[1])] = float(found[2])
        elif found := _DURING.search(line):
            self.during[int(found[1])] = float(found[2])
        elif printed := progress_line(line):
            self._progress(printed.iteration, printed.values)

    def _progress(self, last: int, values: dict[str, str]) -> None:
        if "elapsed time per iteration (ms)" not in values:
            return
        # Without one where it is not a number.
        loss = float(values.get("lm loss", "nan"))
        seconds = float(values["elapsed time per iteration (ms)"]) / 1000
        if self._of_launch == 0:
            # A launch that goes on from a checkpoint does these iterations again.
            self.steps = [step for step in self.steps if step.last < last]
            first = last
        else:
            before = self.steps[-1]
            first = before.last + 1
            if self._of_launch == 1 and last >= first:
                # Megatron prints a launch's first iteration alone, and then within the first interval again.
                count = last - before.first + 1
                loss = (count * loss - before.loss) / (count - 1)
                seconds = max(0.0, (count * seconds - before.seconds) / (count - 1))
        self.steps.append(Step(first, last, loss, seconds, self._of_launch > 1))
        self._of_launch += 1

    @property
    def iteration(self) -> int:
        """The last one that is known to be done."""
        return self.steps[-1].last if self.steps else 0

    def missing(self, iterations: int) -> str | None:
        """What keeps this from being the log of a run of so many iterations that has finished; None if nothing does."""
        if self.parameters is None:
            return "it says no number of parameters"
        if iterations not in self.validation:
            # The last progress line is earlier where --log-interval does not divide the iterations.
            ends = f"it ends at iteration {self.iteration} of {iterations}"
            return ends if self.iteration < iterations else "it has no validation loss at the end"
        if not math.isfinite(self.validation[iterations]) or not math.isfinite(self.steps[-1].loss):
            return "its loss is not a number"
        return None

    def validation_losses(self) -> dict[int, float]:
        """Iteration -> loss, ascending: at an iteration that has both, that of the run's end."""
        return dict(sorted((self.during | self.validation).items()))

    def training_loss(self, log_interval: int) -> float:
        """The mean over the iterations of the last :data:`LAST_INTERVALS` progress lines.

        Counted in iterations, so that a run that was interrupted, and printed other lines, has the same.
        """
        begin = self.iteration - LAST_INTERVALS * log_interval
        weights = [(step.last - max(step.first - 1, begin), step.loss) for step in self.steps if step.last > begin]
        return sum(weight * loss for weight, loss in weights) / sum(weight for weight, _ in weights)

    def seconds_per_iteration(self) -> float:
        """The median, without a launch's first interval unless there is no other."""
        return median([step.seconds for step in self.steps if step.warm] or [step.seconds for step in self.steps[-1:]])

    def seconds(self) -> float:
        """Of training, without start, evaluation and what was done twice."""
        return sum(step.seconds * (step.last - step.first + 1) for step in self.steps)


def read_log(lines: Iterable[str]) -> TrainingLog:
    """All of a log.  A launch that begins anew replaces what the ones before it printed."""
    log = TrainingLog()
    for line in lines:
        log.read(line)
    return log
