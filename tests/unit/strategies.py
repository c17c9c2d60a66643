"""What the property tests draw."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st

from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.routes import RoutePlan
from sla_megatron.pipeline.schedule import Schedule


@st.composite
def sla_configs(draw: st.DrawFn, groups: st.SearchStrategy[int] = st.integers(1, 12)) -> SLAConfig:  # noqa: B008
    """Any valid configuration of up to 14 layers, distances beyond the last layer included."""
    num_layers, num_groups = draw(st.integers(1, 14)), draw(groups)
    layers = draw(st.none() | st.sets(st.integers(1, num_layers)).map(lambda chosen: tuple(sorted(chosen))))
    return SLAConfig(
        num_layers=num_layers,
        num_query_groups=num_groups,
        skip_distances=tuple(draw(st.lists(st.integers(1, num_layers + 2), min_size=1, max_size=3))),
        num_skip_groups=draw(st.integers(0, num_groups)),
        layers=layers,
        kv_projection=draw(st.sampled_from(["full", "pruned"])),
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
def route_plans(draw: st.DrawFn) -> RoutePlan:
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
    return RoutePlan(sla, draw(layouts(sla.num_layers)), size)


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
