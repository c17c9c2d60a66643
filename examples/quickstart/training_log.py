"""Reads the lines that training prints and sums a run up: losses, speed, parameters."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

ITERATION = re.compile(r"\biteration +(\d+)/ *(\d+) \|(.*)")
VALIDATION = re.compile(r"\bvalidation loss at iteration (\d+)\b.*?\| *lm loss value: (\S+)")
# Precedes the command line at the start of each launch in a log.
LAUNCH_MARK = "$ "
PARAMETERS = re.compile(r"sla-megatron: (?:off; )?parameters (\d+)\b")
# What a line holds -> what training does then, and may take a while for.
STAGES = {
    "using world size": "meeting the other processes",
    "compiling dataset index builder": "compiling Megatron's helper for data sets, the first time",
    "sla-megatron: off; parameters": "setting up data and optimizer",
    "sla-megatron: parameters": "setting up data and optimizer",
    "[before the start of training step]": "training",
    "Evaluating on": "measuring the loss on held-out text",
    "saving checkpoint at iteration": "writing a checkpoint",
    "successfully saved checkpoint": "training",
}


@dataclass(frozen=True)
class Step:
    """One progress line; loss and time are Megatron's means over the iterations since the line before."""

    iteration: int
    train_iters: int
    loss: float  # nan where Megatron printed none: it leaves out a loss that is not a number
    ms_per_iteration: float
    warm: bool  # False where the time includes a launch's first iteration, which sets things up


@dataclass(frozen=True)
class Validation:
    """The held-out loss, in nats per token, after `iteration`."""

    iteration: int
    loss: float


@dataclass
class Records:
    """Everything a run has printed so far, over all its launches."""

    parameters: int | None = None
    steps: list[Step] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    steps_of_launch: int = 0

    def read(self, line: str) -> Step | Validation | None:
        """Takes in one line of the log; returns what it said about progress, if anything."""
        if line.startswith(LAUNCH_MARK):
            self.steps_of_launch = 0
        elif found := PARAMETERS.search(line):
            self.parameters = int(found[1])
        elif found := VALIDATION.search(line):
            validation = Validation(int(found[1]), float(found[2]))
            self.validations.append(validation)
            return validation
        elif found := ITERATION.search(line):
            values = dict(part.strip().rsplit(": ", 1) for part in found[3].split("|") if ": " in part)
            if "elapsed time per iteration (ms)" in values:
                loss, ms = values.get("lm loss", "nan"), values["elapsed time per iteration (ms)"]
                # Megatron reports a launch's first iteration alone, then again within the first interval.
                step = Step(int(found[1]), int(found[2]), float(loss), float(ms), self.steps_of_launch >= 2)
                self.steps_of_launch += 1
                self.steps.append(step)
                return step
        return None


def read(log: Path) -> Records:
    """What all launches of a run have printed to `log`; nothing where there is none yet."""
    records = Records()
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        records.read(line)
    return records


def stage(line: str) -> str | None:
    """What training does after it has printed `line`, where that says so."""
    if ITERATION.search(line):
        return "training"
    return next((doing for said, doing in STAGES.items() if said in line), None)


@dataclass(frozen=True)
class Result:
    """What a finished run measured."""

    iteration: int
    parameters: int
    train_loss: float
    validation_loss: float
    tokens_per_second: float

    def as_dict(self) -> dict:
        return asdict(self)


def summarise(records: Records, tokens_per_iteration: int) -> Result:
    """The result of a run that ended well. Raises ValueError naming what its log lacks.

    Speed is the median over the warm progress lines; over the last line alone where none is warm.
    """
    missing = [
        what
        for what, there in (
            ("the number of parameters", records.parameters is not None),
            ("a progress line", records.steps),
            ("a validation loss", records.validations),
        )
        if not there
    ]
    if missing:
        raise ValueError(f"the log lacks {' and '.join(missing)}")
    timed = [step for step in records.steps if step.warm] or records.steps[-1:]
    last = records.steps[-1]
    return Result(
        iteration=last.iteration,
        parameters=records.parameters,
        train_loss=last.loss,
        validation_loss=records.validations[-1].loss,
        tokens_per_second=tokens_per_iteration * 1000.0 / median(step.ms_per_iteration for step in timed),
    )


def describe(event: Step | Validation) -> str:
    """One short line for the terminal."""
    if isinstance(event, Validation):
        return f"{event.iteration:6d}        validation loss {event.loss:.4f}"
    progress = f"{event.iteration:6d}/{event.train_iters:<6d}"
    return f"{progress} loss {event.loss:.4f}   {event.ms_per_iteration:.0f} ms/iteration"
