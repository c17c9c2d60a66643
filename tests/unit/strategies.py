"""What the property tests draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from sla_megatron.attention.declared import declare
from sla_megatron.attention.numbering import LayerNumbers
from sla_megatron.attention.roles import SharedTensor
from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.payload import MicrobatchShape
from sla_megatron.pipeline.residency import Residency, residency
from sla_megatron.pipeline.routes import Route, RoutePlan, StageTraffic
from sla_megatron.pipeline.schedule import Schedule


@dataclass(frozen=True)
class SLAPlan:
    """The route plan of skip-layer attention in a GPT of heads of one channel, and what it says, in K/V groups."""

    sla: SLAConfig
    layout: PipelineLayout
    tensor_parallel_size: int = 1

    @cached_property
    def plan(self) -> RoutePlan:
        numbers = LayerNumbers.of_gpt(self.sla.num_layers)
        return RoutePlan(declare(self.sla, numbers, self.tensor_parallel_size, 1), self.layout)

    @property
    def routes(self) -> list[Route]:
        """Of the keys; values travel beside them."""
        return beside(self.plan.routes, lambda route: route.tensor.name)

    @property
    def moves_nothing(self) -> bool:
        return self.plan.moves_nothing

    def groups(self, name: SharedTensor) -> tuple[int, ...]:
        """The groups that ``name`` is made of, found by asking every one."""
        (reader,) = name.readers
        every = range(self.sla.num_query_groups)
        return tuple(g for g in every if name.source != reader and self.sla.source(reader, g) == name.source)

    def crossing(self, hop: int) -> tuple[tuple[int, int], ...]:
        """The (source layer, group) pairs that cross ``hop``, in payload order, over all tensor-parallel ranks."""
        names = [route.tensor.name for route in beside(self.plan.hop(hop), lambda route: route.tensor.name)]
        return tuple((name.source, group) for name in names for group in self.groups(name))

    def hop_groups(self, hop: int, rank: int = 0) -> int:
        """How many groups cross ``hop``."""
        columns = self.plan.hop_columns(hop, rank)
        assert columns.split == columns.whole % 2 == 0
        return columns.whole // 2

    def traffic(self, stage: int, rank: int = 0) -> StageTraffic:
        return self.plan.traffic(stage, rank)

    def residency(self, schedule: Schedule, rank: int, tensor_rank: int = 0, early_receives: bool = False) -> Residency:
        """In groups."""
        found = residency(self.plan, schedule, MicrobatchShape(1, 1, 1), rank, tensor_rank, early_receives)
        assert found.resident % 2 == found.arriving % 2 == 0
        return Residency(found.resident // 2, found.arrival_buffers, found.arriving // 2)


def beside(found: Sequence[Any], name_of: Callable[[Any], SharedTensor]) -> list[Any]:
    """The keys of what is found; each must have its values right behind it."""
    keys, values = list(found[0::2]), list(found[1::2])
    assert [name_of(key).kind for key in keys] == ["key"] * len(keys)
    assert [("value", *name_of(key)[1:]) for key in keys] == [name_of(value) for value in values]
    return keys


@st.composite
def sla_configs(draw: st.DrawFn, groups: st.SearchStrategy[int] = st.integers(1, 12)) -> SLAConfig:  # noqa: B008
    """Any valid configuration of up to 14 layers, distances beyond the last layer included."""
    num_layers, num_groups = draw(st.integers(1, 14)), draw(groups)
    layers = draw(st.none() | st.sets(st.integers(1, num_layers)).map(lambda chosen: tuple(sorted(chosen))))
    has_distances = draw(st.booleans())
    origins = st.lists(st.integers(1, num_layers + 2 * has_distances), min_size=1, max_size=3).map(tuple)
    return SLAConfig(
        num_layers=num_layers,
        num_query_groups=num_groups,
        skip_distances=draw(origins) if has_distances else (),
        num_skip_groups=draw(st.integers(0, num_groups)),
        layers=layers,
        kv_projection=draw(st.sampled_from(["full", "pruned"])),
        share=draw(st.sampled_from(["kv", "values", "keys"])),
        source_layers=() if has_distances else draw(origins),
    )


@st.composite
def layouts(draw: st.DrawFn, num_layers: int) -> PipelineLayout:
    """Any split of ``num_layers`` over up to 4 ranks with up to 4 stages each, empty stages included."""
    size = draw(st.integers(1, 4))
    num_stages = size * draw(st.integers(1, 4))
    even = [num_layers * stage // num_stages for stage in range(1, num_stages)]
    cuts = st.lists(st.integers(0, num_layers), min_size=num_stages - 1, max_size=num_stages - 1).map(sorted)
    bounds = [0, *draw(st.just(even) | cuts), num_layers]
    return PipelineLayout.of_sizes(size, (end - start for start, end in pairwise(bounds)))


@st.composite
def route_plans(draw: st.DrawFn) -> SLAPlan:
    """The plan of any configuration in any pipeline, with a tensor-parallel size that divides its groups."""
    size = draw(st.sampled_from([1, 2, 4]))
    groups = size * draw(st.integers(1, 3))
    # Of all configurations, most of those that are drawn at random let nothing skip.
    num_layers = draw(st.integers(6, 14))
    skipping = st.builds(
        SLAConfig,
        st.just(num_layers),
        st.just(groups),
        st.lists(st.integers(1, num_layers - 1), min_size=1, max_size=3).map(tuple),
        st.integers(1, groups),
        st.none() | st.sets(st.integers(1, num_layers), min_size=num_layers // 2).map(lambda few: tuple(sorted(few))),
    )
    sla = draw(skipping | sla_configs(st.just(groups)))
    return SLAPlan(sla, draw(layouts(sla.num_layers)), size)


@st.composite
def schedules(draw: st.DrawFn, pipeline_size: int | None = None, num_chunks: int | None = None) -> Schedule:
    """Any schedule that Megatron runs, of up to 5 ranks with up to 4 stages each where these are not given."""
    size = draw(st.integers(1, 5)) if pipeline_size is None else pipeline_size
    chunks = draw(st.integers(1, 4)) if num_chunks is None else num_chunks
    forward_only = draw(st.booleans())
    if chunks == 1:
        return Schedule(size, 1, draw(st.integers(1, 12)), forward_only=forward_only)
    group = draw(st.integers(size, size + 3))
    # The last group is left out, whole, or not smaller than the pipeline.
    rest = draw(st.just(0) | st.integers(size, group))
    return Schedule(size, chunks, draw(st.integers(1, 2)) * group + rest, group, forward_only)
