"""What the property tests draw."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

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

#: The key, or the value, that a layer projects for a group: kind, layer, group, which is counted over the model.
KV = tuple[str, int, int]


def readers_of(sla: SLAConfig, kv: KV) -> tuple[int, ...]:
    """The later layers that read ``kv``, found by asking every one."""
    kind, layer, group = kv
    return tuple(m for m in range(layer + 1, sla.num_layers + 1) if sla.source_of(m, group, kind) == layer)


@dataclass(frozen=True)
class SLAPlan:
    """The route plan of skip-layer attention in a GPT of heads of one channel: a key is an element, so is a value."""

    sla: SLAConfig
    layout: PipelineLayout
    tensor_parallel_size: int = 1

    @cached_property
    def plan(self) -> RoutePlan:
        numbers = LayerNumbers.of_gpt(self.sla.num_layers)
        return RoutePlan(declare(self.sla, numbers, self.tensor_parallel_size, 1), self.layout)

    @property
    def routes(self) -> tuple[Route, ...]:
        return self.plan.routes

    @property
    def moves_nothing(self) -> bool:
        return self.plan.moves_nothing

    def made_of(self, name: SharedTensor) -> list[KV]:
        """What ``name`` is made of: of every group that has those readers."""
        every = [(name.kind, name.source, group) for group in range(self.sla.num_query_groups)]
        return [kv for kv in every if readers_of(self.sla, kv) == name.readers]

    def crossing(self, hop: int) -> tuple[KV, ...]:
        """What crosses ``hop``, in payload order, over all tensor-parallel ranks."""
        return tuple(kv for route in self.plan.hop(hop) for kv in self.made_of(route.tensor.name))

    def hop_width(self, hop: int, rank: int = 0) -> int:
        """How many keys and values cross ``hop``."""
        columns = self.plan.hop_columns(hop, rank)
        assert not columns.split
        return columns.whole

    def traffic(self, stage: int, rank: int = 0) -> StageTraffic:
        return self.plan.traffic(stage, rank)

    def residency(self, schedule: Schedule, rank: int, tensor_rank: int = 0, early_receives: bool = False) -> Residency:
        """In keys and values."""
        return residency(self.plan, schedule, MicrobatchShape(1, 1, 1), rank, tensor_rank, early_receives)


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
    origins = st.lists(st.integers(1, num_layers - 1), min_size=1, max_size=3).map(tuple)
    has_distances = draw(st.booleans())
    skipping = st.builds(
        SLAConfig,
        num_layers=st.just(num_layers),
        num_query_groups=st.just(groups),
        skip_distances=origins if has_distances else st.just(()),
        num_skip_groups=st.integers(1, groups),
        layers=st.none()
        | st.sets(st.integers(1, num_layers), min_size=num_layers // 2).map(lambda few: tuple(sorted(few))),
        share=st.sampled_from(["kv", "values", "keys"]),
        source_layers=st.just(()) if has_distances else origins,
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
