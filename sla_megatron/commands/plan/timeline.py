"""One training step of one pipeline, simulated.  Pure Python, deterministic, linear in the number of passes.

A pass takes a time that depends on its virtual stage and direction; a transfer begins when both of its ranks have
posted it and the transfers before it, in that direction, are done, and takes a time that depends on its hop.  Nothing
else takes time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from ...pipeline.schedule import Pass, Schedule
from .program import RECEIVE, RUN, SEND, Communication, Operation, Pipeline, operations


@dataclass(frozen=True)
class Durations:
    """How long things take, in seconds.

    Attributes:
        forward: a forward pass of each virtual stage, ``P * v`` of them.
        backward: a backward pass of each virtual stage.
        transfer: what crosses each hop, ``P * v - 1`` of them; gradients that go back take as long.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    transfer: tuple[float, ...]

    def of(self, kind: str, stage: int) -> float:
        """A pass of ``kind`` (``"F"`` or ``"B"``) of ``stage``."""
        return (self.forward if kind == "F" else self.backward)[stage]


@dataclass(frozen=True)
class Timeline:
    """When every pass of a step runs.

    Attributes:
        schedule: the order of passes on each rank.
        durations: how long passes and transfers take.
        starts: for each pipeline rank the start of each of its passes, in order, in seconds.
        ends: for each pipeline rank the moment in which it is through, its last transfer included.
    """

    schedule: Schedule
    durations: Durations
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[float, ...]

    @property
    def step_time(self) -> float:
        """Seconds from the first pass to the last rank's end."""
        return max(self.ends)

    @property
    def busy(self) -> float:
        """The share of the ranks' time in which they compute."""
        work = sum(self.durations.forward) + sum(self.durations.backward)
        return work * self.schedule.num_microbatches / (self.step_time * self.schedule.pipeline_size)

    def intervals(self, rank: int) -> Iterator[tuple[Pass, float, float]]:
        """Each pass of ``rank``, its start and its end, in order."""
        for one, start in zip(self.schedule.passes(rank), self.starts[rank], strict=True):
            stage = one.chunk * self.schedule.pipeline_size + rank
            yield one, start, start + self.durations.of(one.kind, stage)


def simulate(
    schedule: Schedule, durations: Durations, communication: Communication | None = None, half_duplex: bool = False
) -> Timeline:
    """Run one training step; ``half_duplex``: activations and gradients between two ranks share a line.

    Raises:
        ValueError: if ``durations`` are not those of as many stages and hops as ``schedule`` has.
        RuntimeError: if ranks wait for each other, so that the passes cannot be ordered.
    """
    pipeline = Pipeline(schedule)
    sizes = len(durations.forward), len(durations.backward), len(durations.transfer)
    if sizes != (pipeline.num_stages, pipeline.num_stages, pipeline.num_hops):
        raise ValueError(f"{pipeline.num_stages} virtual stages, but durations of {sizes}")
    return _Simulation(pipeline, durations, communication or Communication(), half_duplex).run()


class _Simulation:
    """Ranks that run until they wait for a transfer, which goes on when both of its ends are posted.

    The order in which ranks get their turn decides no time: a transfer's end follows from its own two ranks.
    """

    def __init__(
        self, pipeline: Pipeline, durations: Durations, communication: Communication, half_duplex: bool
    ) -> None:
        schedule = pipeline.schedule
        self.pipeline, self.durations = pipeline, durations
        ranks = range(schedule.pipeline_size)
        self.programs = [operations(pipeline, communication, rank) for rank in ranks]
        self.clocks = [0.0] * schedule.pipeline_size
        self.starts: list[list[float]] = [[] for _ in ranks]
        self.pass_times = [self._pass_times(rank) for rank in ranks]
        # Of each transfer, when its first end was posted and when it is done; None: not yet.
        self.posted: list[float | None] = [None] * pipeline.num_transfers
        self.done: list[float | None] = [None] * pipeline.num_transfers
        self.transfer_times = durations.transfer * 2
        # Lanes of one sender and one direction share a line, which carries one transfer at a time.  The rank of a hop's
        # first stage sends its activations, that of its second stage its gradients.
        hops, size = range(pipeline.num_hops), schedule.pipeline_size
        if half_duplex:
            # One line for both; two ranks are each other's neighbours on both sides.
            self.line_of = [hop % size if size > 2 else 0 for hop in hops] * 2
        else:
            self.line_of = [hop % size for hop in hops] + [size + (hop + 1) % size for hop in hops]
        self.line_free = [0.0] * (2 * len(ranks))
        self.waiting: dict[int, list[int]] = {}
        self.ready = deque(ranks)

    def _pass_times(self, rank: int) -> dict[tuple[str, int], float]:
        schedule = self.pipeline.schedule
        return {
            (kind, chunk): self.durations.of(kind, chunk * schedule.pipeline_size + rank)
            for kind in "FB"
            for chunk in range(schedule.num_chunks)
        }

    def run(self) -> Timeline:
        while self.ready:
            self._advance(self.ready.popleft())
        if self.waiting:
            raise RuntimeError(f"pipeline ranks wait for each other: {sorted(map(sorted, self.waiting.values()))}")
        return Timeline(self.pipeline.schedule, self.durations, tuple(map(tuple, self.starts)), tuple(self.clocks))

    def _advance(self, rank: int) -> None:
        """Run ``rank`` until it is through or has to wait."""
        clock, starts, pass_times = self.clocks[rank], self.starts[rank], self.pass_times[rank]
        program: Iterator[Operation] = self.programs[rank]
        for code, what in program:
            if code == RUN:
                starts.append(clock)
                clock += pass_times[what[:2]]
            elif code in (SEND, RECEIVE):
                if self.posted[what] is None:
                    self.posted[what] = clock
                else:
                    self._transfer(what, max(clock, self.posted[what]))
            else:
                done = self.done[what]
                if done is None:
                    self.waiting.setdefault(what, []).append(rank)
                    break
                clock = max(clock, done)
        self.clocks[rank] = clock

    def _transfer(self, transfer: int, start: float) -> None:
        lane = transfer // self.pipeline.schedule.num_microbatches
        line = self.line_of[lane]
        end = max(start, self.line_free[line]) + self.transfer_times[lane]
        self.line_free[line] = self.done[transfer] = end
        for rank in self.waiting.pop(transfer, ()):
            self.clocks[rank] = max(self.clocks[rank], end)
            self.ready.append(rank)
