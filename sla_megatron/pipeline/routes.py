"""The route plan: which tensors cross each hop, in what order, and which wait on a rank.  Pure Python.

A tensor (``declarations.py``) whose source is in stage ``a`` and whose readers are in stages ``c > a`` travels the hops
that follow stage ``a``, as far as the furthest reader's rank is round the ring: the largest ``(c - a) mod P``.  Riding
on the activations, it passes every reader's rank on its way.  A reader whose stage it passes reads it there; for later
stages of that rank it stays *resident* until the last of them has run the same microbatch, whether or not it goes on
as well.  Without interleaving that is every hop from ``a`` to the last reader, and nothing is ever resident; where all
``c - a`` are multiples of ``P`` it is no hop at all.  A rank never receives what it holds or has held of a microbatch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from .declarations import CrossLayerTensor, Declarations, Name
from .layout import PipelineLayout
from .payload import Columns


@dataclass(frozen=True)
class Route:
    """The way of one tensor to stages that are not its source's.

    Attributes:
        tensor: what travels.
        source_stage: the virtual stage of its source layer.
        reader_stages: the later virtual stages that read it, ascending.
        pipeline_size: ``P``.
    """

    tensor: CrossLayerTensor
    source_stage: int
    reader_stages: tuple[int, ...]
    pipeline_size: int

    @property
    def hops(self) -> range:
        """The hops it crosses, each numbered by the stage that it leaves."""
        return range(self.source_stage, self.source_stage + self.num_hops)

    @property
    def num_hops(self) -> int:
        """The largest ``(c - a) mod P``."""
        return max((stage - self.source_stage) % self.pipeline_size for stage in self.reader_stages)

    @cached_property
    def resident(self) -> dict[int, tuple[int, ...]]:
        """Each stage in which it becomes resident -> the later stages of that rank that read it there, ascending."""
        found: dict[int, tuple[int, ...]] = {}
        for reader in self.reader_stages:
            passed = self.source_stage + (reader - self.source_stage) % self.pipeline_size
            if passed != reader:
                found[passed] = (*found.get(passed, ()), reader)
        return found


@dataclass(frozen=True)
class StageTraffic:
    """What one virtual stage does with tensors of other stages, on one tensor-parallel rank, in one microbatch.

    Attributes:
        stage: the virtual stage.
        tensor_parallel_rank: the rank that it is of; tensors that it has nothing of are left out.
        arrives: the tensors in the payload that it receives, in order.
        leaves: the tensors in the payload that it sends, in order.
        keeps: tensors, arrived or its own, that become resident when it has run.
        fetches: resident tensors that it reads.
        readers: for each tensor that it keeps, how many later stages will fetch it.
        reads: for each tensor that layers of this stage read, how many of them.
    """

    stage: int
    tensor_parallel_rank: int
    arrives: tuple[CrossLayerTensor, ...]
    leaves: tuple[CrossLayerTensor, ...]
    keeps: tuple[CrossLayerTensor, ...]
    fetches: tuple[CrossLayerTensor, ...]
    readers: dict[Name, int]
    reads: Counter[Name]

    @property
    def is_none(self) -> bool:
        """Whether the stage does nothing with them."""
        return not (self.arrives or self.leaves or self.keeps or self.fetches)

    @cached_property
    def uses(self) -> Counter[Name]:
        """How often each tensor is taken in a microbatch: by a layer, to be sent, to be kept."""
        return self.reads + Counter(tensor.name for tensor in (*self.leaves, *self.keeps))

    @cached_property
    def outlives(self) -> dict[bool, tuple[bool, ...]]:
        """Of what arrives, which outlives the stage's forward pass.

        By whether the stage holds on to all that it reads until its backward pass, as full recomputation does.
        """
        kept = {tensor.name for tensor in self.keeps}
        return {
            holds: tuple(
                one.name in kept or (self.reads[one.name] > 0 and (holds or not one.readers_copy))
                for one in self.arrives
            )
            for holds in (False, True)
        }


@dataclass(frozen=True)
class RoutePlan:
    """Where every tensor that crosses layers goes in one pipeline; the same object on every rank.

    Args:
        declared: the tensors.
        layout: the layers of each virtual stage.
    """

    declared: Declarations
    layout: PipelineLayout

    def __post_init__(self) -> None:
        if self.layout.num_layers != self.declared.num_layers:
            raise ValueError(f"the layout holds {self.layout.num_layers} layers, the model {self.declared.num_layers}")

    @cached_property
    def routes(self) -> tuple[Route, ...]:
        """The tensors that another stage than their source's reads, in payload order."""
        stage_of = self.layout.stage_of
        found = []
        for tensor in self.declared.tensors:
            source = stage_of[tensor.source]
            readers = sorted({stage_of[reader] for reader in tensor.readers} - {source})
            if readers:
                found.append(Route(tensor, source, tuple(readers), self.layout.pipeline_size))
        return tuple(found)

    def hop(self, hop: int) -> tuple[Route, ...]:
        """The routes that cross ``hop``, in the order in which their tensors lie in the payload."""
        return tuple(route for route in self.routes if hop in route.hops)

    def hop_columns(self, hop: int, tensor_parallel_rank: int = 0) -> Columns:
        """What crosses ``hop`` on one tensor-parallel rank; nothing on the hops before stage 0 and after the last."""
        return Columns.of((route.tensor for route in self.hop(hop)), tensor_parallel_rank)

    def traffic(self, stage: int, tensor_parallel_rank: int = 0) -> StageTraffic:
        """What ``stage`` does on ``tensor_parallel_rank``."""
        here = [route for route in self.routes if route.tensor.widths[tensor_parallel_rank]]
        keeping = [route for route in here if stage in route.resident]
        declared = self.declared.on_rank(tensor_parallel_rank)
        return StageTraffic(
            stage,
            tensor_parallel_rank,
            arrives=tuple(route.tensor for route in here if stage - 1 in route.hops),
            leaves=tuple(route.tensor for route in here if stage in route.hops),
            keeps=tuple(route.tensor for route in keeping),
            fetches=tuple(
                route.tensor for route in here if any(stage in readers for readers in route.resident.values())
            ),
            readers={route.tensor.name: len(route.resident[stage]) for route in keeping},
            reads=declared.reads_within(self.layout.stages[stage]),
        )

    @property
    def moves_nothing(self) -> bool:
        """Whether no tensor leaves its stage, so that a stock pipeline does."""
        return not self.routes

    def __str__(self) -> str:
        """One line a hop and one line a rank: what crosses and what is resident."""
        lines = [f"{len(self.routes)} tensors of other layers between {self.layout.num_stages} virtual stages"]
        for hop in range(self.layout.num_stages - 1):
            ranks = f"rank {self.layout.rank(hop)} -> {self.layout.rank(hop + 1)}"
            crossing = "; ".join(str(route.tensor.name) for route in self.hop(hop)) or "none"
            lines.append(f"hop {hop} ({ranks}): {crossing}")
        for rank in range(self.layout.pipeline_size):
            for route in self.routes:
                for stage, readers in route.resident.items():
                    if self.layout.rank(stage) == rank:
                        until = f"stage{'s' * (len(readers) > 1)} {', '.join(map(str, readers))}"
                        lines.append(f"rank {rank}: {route.tensor.name} resident from stage {stage} to {until}")
        return "\n".join(lines)
