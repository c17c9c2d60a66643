"""From what was said around a fault, and when, to the parts of the time until the next new step.

Events are lines with the time of each, in order: the job's log as it came, what Slurm's daemons wrote, and what the
benchmark did itself.  A line of the log was said when it came, but where it holds a time of its own: Megatron prints
when each part of its start was over in one go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

#: Parts of the time from a fault to the next new step, in order, and what ends each.
PARTS = {
    "detection": "the training step has ended, or Slurm itself requeues the job",
    "requeue": "Slurm has started the script again, where it is requeued",
    "script": "the script has examined the nodes and noted the attempt",
    "launch": "the first rank's Python has started",
    "imports": "torch and Megatron are imported",
    "initialisation": "flags are read, and ranks have met",
    "model": "model and optimizer are built",
    "load": "the checkpoint is loaded",
    "data": "the data loaders are built",
    "first step": "a step is done",
    "redone steps": "a step is done that no attempt had done before",
}

_NUMBER = re.compile(r"iteration +(\d+)/ *\d+ .*elapsed time per iteration \(ms\): ([\d.]+)")
_STAMP = re.compile(r"(?:datetime: |^(?:\d+: )?(?:\[default\d+\]:)? *\[)(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+)")
_LOAD = re.compile(r"load-checkpoint \.*: \([\d.]+, ([\d.]+)\)")
_CPU = re.compile(r"^recovery: cpu rank (\d+): ([\d.]+)")
_FAULT = re.compile(r"^recovery: fault (\w+)")

#: Parts -> what a line has that ends one; the load's time is a figure of Megatron's, inside the one after it.
_MARKS = {
    "script": re.compile(r"sla-job: attempt \d+ of this run"),
    "launch": re.compile(r"\[before library-setup\]"),
    "imports": re.compile(r"\[after library-setup\]"),
    "initialisation": re.compile(r"\[after megatron is initialized\]"),
    "load": re.compile(r"\[after model, optimizer, and learning rate scheduler are built\]"),
    "data": re.compile(r"\[before the start of training step\]"),
}
_LAUNCHED = re.compile(r"^slurmd: .*Launching batch job")
_ENDED = re.compile(r"slurm\.sbatch: the step ended with status|^slurmctld: .*[Rr]equeu")


class Event(NamedTuple):
    """A line, and when it was said, in seconds."""

    at: float
    line: str

    @classmethod
    def of(cls, arrived: float, line: str) -> Event:
        """A line that came at ``arrived``, unless it says better."""
        found = _STAMP.search(line)
        return cls(datetime.fromisoformat(found[1]).timestamp() if found else arrived, line)


def read_events(text: str) -> list[Event]:
    """What :func:`written` wrote."""
    split = (line.split(" ", 1) for line in text.splitlines())
    return [Event.of(float(at), line) for at, line in split]


def written(stamped: Sequence[tuple[float, str]]) -> str:
    """Lines with the times at which they came, as :func:`read_events` takes them."""
    return "".join(f"{at:.3f} {line}\n" for at, line in stamped)


@dataclass
class Attempt:
    """One start of the job: when each mark of it was seen first, and its steps as (when, number, milliseconds)."""

    marks: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[float, int, float]] = field(default_factory=list)
    load: float = 0.0
    cpu: dict[int, float] = field(default_factory=dict)
    fault: str | None = None
    fault_at: float | None = None
    ended: float | None = None


def attempts(events: Sequence[Event]) -> list[Attempt]:
    """The starts of the job, each from where ``sla-job`` noted it; of two ranks' lines the first counts."""
    found: list[Attempt] = []
    launched = None
    for at, line in events:
        if _LAUNCHED.search(line):
            launched = at
        if _MARKS["script"].search(line):
            # An attempt that goes on in the same job has no launch of its own.
            found.append(Attempt({} if launched is None else {"requeue": launched}))
            launched = None
        if not found:
            continue
        current = found[-1]
        for part, mark in _MARKS.items():
            if mark.search(line):
                current.marks.setdefault(part, at)
        if (step := _NUMBER.search(line)) and (not current.steps or current.steps[-1][1] < int(step[1])):
            current.steps.append((at, int(step[1]), float(step[2])))
        elif load := _LOAD.search(line):
            current.load = max(current.load, float(load[1]) / 1000)
        elif cpu := _CPU.search(line):
            current.cpu[int(cpu[1])] = float(cpu[2])
        elif fault := _FAULT.search(line):
            current.fault, current.fault_at = fault[1], at
        elif _ENDED.search(line) and current.fault_at is not None and current.ended is None:
            current.ended = at
    return found


def recoveries(found: Sequence[Attempt]) -> Iterator[dict[str, Any]]:
    """A row for each fault: its kind, seconds of each part of :data:`PARTS` and in all, and how many steps were lost.

    Raises ValueError where an attempt after a fault never came to a new step.
    """
    reached = 0
    for number, (before, after) in enumerate(zip(found, found[1:], strict=False), 1):
        reached = max([reached, *(step for _, step, _ in before.steps)])
        if before.fault_at is None:
            continue
        new = [at for at, step, _ in after.steps if step > reached]
        missing = [part for part in _MARKS if part not in after.marks]
        if missing or not new:
            raise ValueError(f"attempt {number + 1} has no {missing[0] if missing else 'new step'}")
        # Where Slurm ends the script with the job, the script says nothing.
        ended = [at for at in (before.ended, after.marks.get("requeue")) if at is not None]
        if not ended:
            raise ValueError(f"attempt {number} has no end")
        marks = {"requeue": min(ended)} | after.marks
        ends = {
            "detection": min(ended),
            **{part: marks[part] for part in ("requeue", "script", "launch", "imports", "initialisation")},
            "model": marks["load"] - after.load,
            **{part: marks[part] for part in ("load", "data")},
            "first step": after.steps[0][0],
            "redone steps": new[0],
        }
        seconds, earlier = {}, before.fault_at
        for part in PARTS:
            seconds[part] = ends[part] - earlier
            earlier = ends[part]
        yield {
            "fault": before.fault,
            "seconds": seconds,
            "all_seconds": new[0] - before.fault_at,
            # Done by then, and not in what the next attempt began from.
            # What a step's end had to say may be lost with the job, and the step be saved.
            "lost_steps": max(before.steps[-1][1] - (after.steps[0][1] - 1), 0),
            "rank_cpu_seconds": sorted(after.cpu.values()),
        }
