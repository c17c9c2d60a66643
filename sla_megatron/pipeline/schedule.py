"""The order of forward and backward passes on a pipeline rank, as Megatron's schedules run them.  Pure Python.

Restates ``megatron.core.pipeline_parallel.schedules``: ``get_schedule_table``, ``get_pp_rank_microbatches`` and the
warm-up, steady and cool-down loops of 1F1B and interleaved 1F1B.  ``transport.py`` compares it with upstream's own
functions before it relies on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Pass(NamedTuple):
    """One forward (``"F"``) or backward (``"B"``) pass of one model chunk for one microbatch."""

    kind: Literal["F", "B"]
    chunk: int
    microbatch: int


@dataclass(frozen=True)
class Schedule:
    """One run of a schedule: a training step, or an evaluation step.

    Args:
        pipeline_size: ``P``.
        num_chunks: ``v``; 1 is 1F1B, more is interleaved 1F1B.
        num_microbatches: ``M``.
        microbatch_group_size: ``--microbatch-group-size-per-virtual-pipeline-stage``; ``None``: ``P``, its default.
        forward_only: an evaluation step.

    Raises:
        ValueError: where interleaving does not run with these numbers (upstream refuses them too).
    """

    pipeline_size: int
    num_chunks: int
    num_microbatches: int
    microbatch_group_size: int | None = None
    forward_only: bool = False

    def __post_init__(self) -> None:
        if self.num_microbatches < 1:
            raise ValueError(f"num_microbatches must be at least 1: {self.num_microbatches}")
        if self.num_chunks > 1:
            if not self.pipeline_size <= self.group_size <= self.num_microbatches:
                raise ValueError(
                    f"interleaving needs {self.pipeline_size} (pipeline size) <= {self.group_size} (microbatch group) "
                    f"<= {self.num_microbatches} (microbatches)"
                )
            if 0 < self.num_microbatches % self.group_size < self.pipeline_size:
                raise ValueError(
                    f"{self.num_microbatches} microbatches leave a last group of "
                    f"{self.num_microbatches % self.group_size}, fewer than the pipeline size {self.pipeline_size}"
                )

    @property
    def group_size(self) -> int:
        """Neighbouring microbatches of one chunk before the next chunk's turn."""
        return self.pipeline_size if self.microbatch_group_size is None else self.microbatch_group_size

    def table(self) -> list[tuple[int, int]]:
        """(microbatch, chunk) in the order of forward passes, the same on every rank."""
        if self.num_chunks == 1:
            return [(microbatch, 0) for microbatch in range(self.num_microbatches)]
        return [
            (microbatch, chunk)
            for first in range(0, self.num_microbatches, self.group_size)
            for chunk in range(self.num_chunks)
            for microbatch in range(first, min(first + self.group_size, self.num_microbatches))
        ]

    def forwards(self) -> list[Pass]:
        """A rank's forward passes, in order."""
        return [Pass("F", chunk, microbatch) for microbatch, chunk in self.table()]

    def backwards(self) -> list[Pass]:
        """A rank's backward passes, in order: the table with its chunks reversed; none in an evaluation."""
        if self.forward_only:
            return []
        return [Pass("B", self.num_chunks - 1 - chunk, microbatch) for microbatch, chunk in self.table()]

    def num_warmup(self, rank: int) -> int:
        """Forward passes of ``rank`` before its first backward pass can be paired with one."""
        total = self.num_microbatches * self.num_chunks
        if self.forward_only:
            return total
        warmup = self.pipeline_size - rank - 1
        if self.num_chunks > 1:
            warmup = 2 * warmup + (self.num_chunks - 1) * self.group_size
        return min(warmup, total)

    def passes(self, rank: int) -> Iterator[Pass]:
        """Every pass of ``rank``, in the order in which it runs them."""
        forwards, backwards = self.forwards(), self.backwards()
        warmup = self.num_warmup(rank)
        yield from forwards[:warmup]
        if self.forward_only:
            return
        steady = len(forwards) - warmup
        for forward, backward in zip(forwards[warmup:], backwards[:steady], strict=True):
            yield forward
            yield backward
        yield from backwards[steady:]
