"""Which layers each virtual stage holds.  Pure Python.

Virtual stages are numbered in layer order, ``0 .. P*v-1``: stage ``s`` is model chunk ``s // P`` of pipeline rank
``s mod P``.  Without interleaving ``v = 1``.  A *hop* has the number of the stage that it leaves: hop ``s`` goes from
stage ``s`` to stage ``s + 1``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class PipelineLayout:
    """The layers of a model over ``P`` pipeline ranks with ``v`` virtual stages each.

    Args:
        pipeline_size: ``P``.
        stages: each virtual stage's layers, 1-based, in stage order; a stage may hold none (embedding or loss alone).
        further_tokens: how many further tokens are predicted, beside the next one, by layers after layer ``L``.
        further_stage: the virtual stage of those layers; ``None``: the last.

    Raises:
        ValueError: unless the stages hold layers ``1..L`` in order and their number is a multiple of ``P``.
    """

    pipeline_size: int
    stages: tuple[tuple[int, ...], ...]
    further_tokens: int = 0
    further_stage: int | None = None

    def __post_init__(self) -> None:
        if self.pipeline_size < 1 or not self.stages or len(self.stages) % self.pipeline_size:
            raise ValueError(f"{len(self.stages)} virtual stages do not divide over {self.pipeline_size} ranks")
        layers = [layer for stage in self.stages for layer in stage]
        if layers != list(range(1, len(layers) + 1)):
            raise ValueError(f"virtual stages must hold the layers 1..L in order: {self.stages}")

    @classmethod
    def of_sizes(cls, pipeline_size: int, sizes: Iterable[int]) -> PipelineLayout:
        """The layout whose stage ``s`` holds ``sizes[s]`` layers."""
        stages, first = [], 1
        for size in sizes:
            stages.append(tuple(range(first, first + size)))
            first += size
        return cls(pipeline_size, tuple(stages))

    @property
    def num_layers(self) -> int:
        """``L``."""
        return sum(map(len, self.stages))

    @property
    def num_stages(self) -> int:
        """``P * v``."""
        return len(self.stages)

    @property
    def num_chunks(self) -> int:
        """``v``, model chunks (virtual stages) of each rank."""
        return len(self.stages) // self.pipeline_size

    def hidden_states(self, hop: int) -> int:
        """How many hidden states of one token cross ``hop``, one after the other along the sequence.

        One, and after the stage that predicts further tokens one more for each of them.
        """
        is_after = self.further_stage is not None and hop >= self.further_stage
        return 1 + (self.further_tokens if is_after else 0)

    def rank(self, stage: int) -> int:
        """The pipeline rank that runs ``stage``."""
        return stage % self.pipeline_size

    def stage(self, rank: int, chunk: int) -> int:
        """The virtual stage that is model chunk ``chunk`` of ``rank``."""
        return chunk * self.pipeline_size + rank

    @cached_property
    def stage_of(self) -> dict[int, int]:
        """Layer -> the virtual stage that holds it."""
        return {layer: stage for stage, layers in enumerate(self.stages) for layer in layers}
