"""The route plan: which skip-layer K/V cross each hop, in what order, and which wait on a rank.  Pure Python.

A bundle (the K/V groups that one layer hands to one later layer, ``attention/roles.py``) whose source is in stage ``a``
and whose reader is in stage ``c > a`` travels the ``(c - a) mod P`` hops that follow stage ``a``.  Riding on the
activations, it is then on the rank that runs stage ``c``; it stays *resident* there until stage ``c`` runs the same
microbatch.  Without interleaving that is every hop from ``a`` to ``c``, and nothing is ever resident; where ``c - a``
is a multiple of ``P`` it is no hop at all.  A rank never receives what it holds or has held of a microbatch.

A bundle has one reader, since a group has one distance: no bundle is both kept and sent on.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from ..attention.roles import BundleName
from ..attention.sla_config import SLAConfig
from .layout import PipelineLayout


@dataclass(frozen=True)
class Route:
    """The way of one bundle between two stages.

    Attributes:
        name: the bundle, (source layer, distance).
        groups: its K/V groups, of the whole model, ascending.
        source_stage: the virtual stage of its source layer.
        reader_stage: the virtual stage of its reader, later than ``source_stage``.
        pipeline_size: ``P``.
    """

    name: BundleName
    groups: tuple[int, ...]
    source_stage: int
    reader_stage: int
    pipeline_size: int

    @property
    def hops(self) -> range:
        """The hops it crosses, each numbered by the stage that it leaves."""
        return range(self.source_stage, self.source_stage + self.num_hops)

    @property
    def num_hops(self) -> int:
        """``(c - a) mod P``."""
        return (self.reader_stage - self.source_stage) % self.pipeline_size

    @property
    def resident_stage(self) -> int | None:
        """The stage in which it becomes resident, to be read by a later stage of that rank; ``None`` if it never is."""
        last = self.source_stage + self.num_hops
        return last if last != self.reader_stage else None


@dataclass(frozen=True)
class StageTraffic:
    """What one virtual stage does with bundles of other stages, on one tensor-parallel rank, in one microbatch.

    Attributes:
        stage: the virtual stage.
        arrives: the bundles in the payload that it receives, in order.
        leaves: the bundles in the payload that it sends, in order.
        keeps: bundles, arrived or its own, that become resident when it has run.
        fetches: resident bundles that it reads.
        num_groups: for each of these bundles, how many K/V groups of it this tensor-parallel rank holds.
    """

    stage: int
    arrives: tuple[BundleName, ...]
    leaves: tuple[BundleName, ...]
    keeps: tuple[BundleName, ...]
    fetches: tuple[BundleName, ...]
    num_groups: dict[BundleName, int]

    @property
    def is_none(self) -> bool:
        """Whether the stage does nothing with them."""
        return not (self.arrives or self.leaves or self.keeps or self.fetches)


@dataclass(frozen=True)
class RoutePlan:
    """Where every skip-layer K/V group goes in one pipeline; the same object on every rank.

    Args:
        sla: what skip-layer attention means in the model.
        layout: the layers of each virtual stage.
        tensor_parallel_size: ``T``; a rank of it sends its own K/V groups only.
    """

    sla: SLAConfig
    layout: PipelineLayout
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.layout.num_layers != self.sla.num_layers:
            raise ValueError(f"the layout holds {self.layout.num_layers} layers, the model {self.sla.num_layers}")

    @cached_property
    def routes(self) -> tuple[Route, ...]:
        """The bundles whose source and reader are in different stages, in order of (source layer, distance)."""
        groups: dict[BundleName, list[int]] = defaultdict(list)
        for layer in range(1, self.sla.num_layers + 1):
            for group in self.sla.skip_groups:
                reader = self.sla.consumer(layer, group)
                if reader is not None:
                    groups[layer, reader - layer].append(group)
        stage_of = self.layout.stage_of
        routes = [
            Route((layer, n), tuple(its), stage_of[layer], stage_of[layer + n], self.layout.pipeline_size)
            for (layer, n), its in sorted(groups.items())
        ]
        return tuple(route for route in routes if route.source_stage != route.reader_stage)

    def hop(self, hop: int) -> tuple[Route, ...]:
        """The routes that cross ``hop``, in the order in which their bundles lie in the payload."""
        return tuple(route for route in self.routes if hop in route.hops)

    def crossing(self, hop: int) -> tuple[tuple[int, int], ...]:
        """The (source layer, group) pairs that cross ``hop``, in payload order, over all tensor-parallel ranks."""
        return tuple((route.name[0], group) for route in self.hop(hop) for group in route.groups)

    def groups_on(self, route: Route, tensor_parallel_rank: int) -> int:
        """How many of the route's K/V groups ``tensor_parallel_rank`` holds."""
        held = self.sla.rank_groups(self.tensor_parallel_size, tensor_parallel_rank)
        return sum(group in held for group in route.groups)

    def hop_groups(self, hop: int, tensor_parallel_rank: int = 0) -> int:
        """How many K/V groups cross ``hop`` on one tensor-parallel rank; 0 for the hops before stage 0 and the last."""
        return sum(self.groups_on(route, tensor_parallel_rank) for route in self.hop(hop))

    def traffic(self, stage: int, tensor_parallel_rank: int = 0) -> StageTraffic:
        """What ``stage`` does on ``tensor_parallel_rank``; bundles of which that rank holds no group are left out."""
        sizes = {route.name: self.groups_on(route, tensor_parallel_rank) for route in self.routes}
        here = [route for route in self.routes if sizes[route.name]]

        def names(chosen: list[Route]) -> tuple[BundleName, ...]:
            return tuple(route.name for route in chosen)

        arrives = [route for route in here if stage - 1 in route.hops]
        leaves = [route for route in here if stage in route.hops]
        keeps = [route for route in here if route.resident_stage == stage]
        fetches = [route for route in here if route.resident_stage is not None and route.reader_stage == stage]
        concerned = {route.name for route in arrives + leaves + keeps + fetches}
        return StageTraffic(
            stage,
            names(arrives),
            names(leaves),
            names(keeps),
            names(fetches),
            {name: size for name, size in sizes.items() if name in concerned},
        )

    @property
    def moves_nothing(self) -> bool:
        """Whether no K/V leave their stage, so that a stock pipeline does."""
        return not self.routes

    def __str__(self) -> str:
        """One line a hop and one line a rank: what crosses and what is resident."""
        lines = [f"{len(self.routes)} bundles of skip-layer K/V between {self.layout.num_stages} virtual stages"]
        for hop in range(self.layout.num_stages - 1):
            ranks = f"rank {self.layout.rank(hop)} -> {self.layout.rank(hop + 1)}"
            lines.append(f"hop {hop} ({ranks}): {_listed(self.hop(hop))}")
        for rank in range(self.layout.pipeline_size):
            for route in self.routes:
                if route.resident_stage is not None and self.layout.rank(route.resident_stage) == rank:
                    lines.append(
                        f"rank {rank}: {_listed([route])} resident from stage {route.resident_stage} "
                        f"to stage {route.reader_stage}"
                    )
        return "\n".join(lines)


def _listed(routes: list[Route] | tuple[Route, ...]) -> str:
    """``layer 3 groups 1,2 (for layer 9)``, or ``no K/V``."""
    parts = [
        f"layer {route.name[0]} groups {','.join(map(str, route.groups))} (for layer {sum(route.name)})"
        for route in routes
    ]
    return "; ".join(parts) or "no K/V"
