"""What the property tests draw."""

from __future__ import annotations

from hypothesis import strategies as st

from sla_megatron.config import SLAConfig


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
