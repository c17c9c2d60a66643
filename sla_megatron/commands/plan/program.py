"""What each pipeline rank does in a training step, in order: passes, transfers posted, transfers waited for.

Restates the communication in ``megatron.core.pipeline_parallel.schedules``: 1F1B, and interleaved 1F1B with and without
overlapped communication.  The passes themselves come from ``pipeline.schedule``.

A transfer has a number: that of its lane times ``M`` plus its microbatch.  The lane is the hop for activations, and
``num_hops`` plus the hop for gradients, which go back over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ...pipeline.schedule import Pass, Schedule

#: The kinds of operation.  ``RUN`` comes with a :class:`Pass`, the others with the number of a transfer: ``SEND`` and
#: ``RECEIVE`` post their end of it and go on, ``WAIT`` goes on when it is done.
RUN, SEND, RECEIVE, WAIT = range(4)

Operation = tuple[int, Pass | int]


@dataclass(frozen=True)
class Communication:
    """How a pipeline's transfers meet its passes.

    Attributes:
        overlap: interleaved only, Megatron's default: while forward and backward passes alternate, what arrives does so
            during compute.  For activations that leave, upstream waits even so, since it frees them.
        overlap_warmup_flush: the same before and after (``--overlap-p2p-communication-warmup-flush``).
    """

    overlap: bool = False
    overlap_warmup_flush: bool = False


@dataclass(frozen=True)
class Pipeline:
    """The numbers of a pipeline's transfers."""

    schedule: Schedule

    @property
    def num_stages(self) -> int:
        """``P * v``."""
        return self.schedule.pipeline_size * self.schedule.num_chunks

    @property
    def num_hops(self) -> int:
        """``P * v - 1``."""
        return self.num_stages - 1

    @property
    def num_transfers(self) -> int:
        """Activations and gradients of a step."""
        return 2 * self.num_hops * self.schedule.num_microbatches

    @cached_property
    def forwards(self) -> list[Pass]:
        """Every rank's forward passes, in order."""
        return self.schedule.forwards()

    @cached_property
    def backwards(self) -> list[Pass]:
        """Every rank's backward passes, in order."""
        return self.schedule.backwards()

    def sent(self, rank: int, one: Pass) -> list[int]:
        """The transfer, if there is one, of what ``one`` computes on ``rank``."""
        stage = one.chunk * self.schedule.pipeline_size + rank
        if one.kind == "F":
            return [] if stage == self.num_hops else [stage * self.schedule.num_microbatches + one.microbatch]
        lane = self.num_hops + stage - 1
        return [] if stage == 0 else [lane * self.schedule.num_microbatches + one.microbatch]

    def read(self, rank: int, one: Pass) -> list[int]:
        """The transfer, if there is one, that ``one`` needs on ``rank``."""
        stage = one.chunk * self.schedule.pipeline_size + rank
        if one.kind == "F":
            return [] if stage == 0 else [(stage - 1) * self.schedule.num_microbatches + one.microbatch]
        lane = self.num_hops + stage
        return [] if stage == self.num_hops else [lane * self.schedule.num_microbatches + one.microbatch]


def operations(pipeline: Pipeline, communication: Communication, rank: int) -> Iterator[Operation]:
    """Everything that ``rank`` does in one training step, in order."""
    if pipeline.schedule.num_chunks == 1:
        return _one_forward_one_backward(pipeline, rank)
    return _Interleaved(pipeline, communication, rank).operations()


def _post(sends: list[int], receives: list[int]) -> Iterator[Operation]:
    for transfer in sends:
        yield SEND, transfer
    for transfer in receives:
        yield RECEIVE, transfer


def _wait(transfers: list[int]) -> Iterator[Operation]:
    for transfer in transfers:
        yield WAIT, transfer


def _exchange(sends: list[int], receives: list[int]) -> Iterator[Operation]:
    yield from _post(sends, receives)
    yield from _wait(sends + receives)


def _one_forward_one_backward(pipeline: Pipeline, rank: int) -> Iterator[Operation]:
    """1F1B, in which a rank does nothing else while it sends or receives."""
    passes = list(pipeline.schedule.passes(rank))
    warmup = pipeline.schedule.num_warmup(rank)
    # In between, a rank sends what it has computed and receives what it needs next in one exchange.
    paired = range(warmup, len(passes) - warmup - 1)
    yield from _exchange([], pipeline.read(rank, passes[0]))
    for index, one in enumerate(passes):
        yield RUN, one
        sends = pipeline.sent(rank, one)
        receives = pipeline.read(rank, passes[index + 1]) if index + 1 < len(passes) else []
        if index in paired:
            yield from _exchange(sends, receives)
        else:
            yield from _exchange(sends, [])
            yield from _exchange([], receives)


class _Interleaved:
    """Interleaved 1F1B on one rank."""

    def __init__(self, pipeline: Pipeline, communication: Communication, rank: int) -> None:
        self.pipeline, self.rank = pipeline, rank
        self.overlap = communication.overlap
        self.flush = communication.overlap and communication.overlap_warmup_flush
        schedule = pipeline.schedule
        self.is_first, self.is_last = rank == 0, rank == schedule.pipeline_size - 1
        self.warmup = schedule.num_warmup(rank)
        self.total = schedule.num_microbatches * schedule.num_chunks

    def operations(self) -> Iterator[Operation]:
        yield from self._warm_up()
        # What was computed last and is still being sent: gradients, for which only the next ones wait.
        self.sending: list[int] = []
        yield from self._steady_overlapped() if self.overlap else self._steady()
        yield from self._cool_down()
        yield from _wait(self.sending)

    def _next_input(self, step: int) -> list[int]:
        """What a rank begins to receive when its forward pass number ``step`` has run."""
        forwards, size = self.pipeline.forwards, self.pipeline.schedule.pipeline_size
        if step == self.total - 1:
            return []
        if not self.is_first:
            return self.pipeline.read(self.rank, forwards[step + 1])
        # The first rank is P - 1 passes ahead of the last one, and takes what that one computes.
        return self.pipeline.sent(size - 1, forwards[step - size + 1]) if step >= size - 1 else []

    def _next_gradient(self, step: int) -> list[int]:
        """What a rank begins to receive when its backward pass number ``step`` has run."""
        backwards, size = self.pipeline.backwards, self.pipeline.schedule.pipeline_size
        if step == self.total - 1:
            return []
        if not self.is_last:
            return self.pipeline.read(self.rank, backwards[step + 1])
        return self.pipeline.sent(0, backwards[step - size + 1]) if step >= size - 1 else []

    def _warm_up(self) -> Iterator[Operation]:
        pipeline, rank = self.pipeline, self.rank
        yield from _exchange([], pipeline.read(rank, pipeline.forwards[0]))
        all_warmup = self.warmup == self.total
        for step, one in enumerate(pipeline.forwards[: self.warmup]):
            receives = self._next_input(step)
            early = receives if self.flush and not self.is_first else []
            yield from _wait(pipeline.read(rank, one))
            yield from _post([], early)
            yield RUN, one
            sends = pipeline.sent(rank, one)
            is_end = step == self.warmup - 1 and not all_warmup
            gradient = pipeline.read(rank, pipeline.backwards[0]) if is_end else []
            if self.flush:
                yield from _post(sends, [] if early else receives)
                yield from _wait(sends)
            elif self.overlap:
                yield from _exchange(sends, receives)
            else:
                yield from _exchange(sends, receives + gradient)
            if self.overlap:
                yield from _post([], gradient)
        # Without a forward pass to warm up with, the last rank has no gradient to receive either: it computes them.
        if all_warmup:
            yield from _exchange([], pipeline.read(rank, pipeline.backwards[0]))

    def _steady(self) -> Iterator[Operation]:
        pipeline, rank = self.pipeline, self.rank
        for step in range(self.warmup, self.total):
            forward, backward = pipeline.forwards[step], pipeline.backwards[step - self.warmup]
            yield RUN, forward
            yield RUN, backward
            receives = self._next_input(step) + self._next_gradient(step - self.warmup)
            yield from _exchange(pipeline.sent(rank, forward) + pipeline.sent(rank, backward), receives)

    def _steady_overlapped(self) -> Iterator[Operation]:
        pipeline, rank = self.pipeline, self.rank
        for step in range(self.warmup, self.total):
            forward, backward = pipeline.forwards[step], pipeline.backwards[step - self.warmup]
            yield from _wait(pipeline.read(rank, forward))
            yield RUN, forward
            sends = pipeline.sent(rank, forward)
            yield from _post(sends, self._next_input(step))
            # Upstream frees what it has sent, and waits until it may.
            yield from _wait(sends)
            yield from _wait(pipeline.read(rank, backward))
            yield RUN, backward
            yield from self._send_gradient(backward, self._next_gradient(step - self.warmup))

    def _cool_down(self) -> Iterator[Operation]:
        pipeline, rank = self.pipeline, self.rank
        for step in range(self.total - self.warmup, self.total):
            backward, receives = pipeline.backwards[step], self._next_gradient(step)
            early = receives if self.flush and not self.is_last else []
            yield from _wait(pipeline.read(rank, backward))
            yield from _post([], early)
            yield RUN, backward
            if self.flush:
                yield from self._send_gradient(backward, [] if early else receives)
            else:
                yield from _exchange(pipeline.sent(rank, backward), receives)

    def _send_gradient(self, backward: Pass, receives: list[int]) -> Iterator[Operation]:
        sends = self.pipeline.sent(self.rank, backward)
        yield from _post(sends, receives)
        yield from _wait(self.sending)
        self.sending = sends
