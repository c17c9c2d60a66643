"""The caches of an engine that has one for each attention module: run with names in the place of keys and values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
from sla_megatron.hf.serving.cache_plan import LayerPlan, plan_layers, rank_groups

from .hf_models import tiny

#: A layer and a group, both as the configuration numbers them.
Pair = tuple[int, int]


@st.composite
def configurations(draw: st.DrawFn) -> SlaGPTConfig:
    layers, groups = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    return SlaGPTConfig(
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=groups,
        sla_skip_distances=draw(st.lists(st.integers(1, layers + 1), max_size=3)),
        sla_skip_groups=sorted(draw(st.sets(st.integers(0, groups - 1)))),
        sla_layers=sorted(draw(st.sets(st.integers(1, layers)))),
    )


def run(plans: list[LayerPlan]) -> tuple[list[list[Pair]], list[list[Pair]]]:
    """What each layer's attention reads, in the order of its heads, and what each cache holds."""
    read, caches = [], []
    handed: dict[tuple[int, int], list[Pair]] = {}
    kept: dict[tuple[int, int], list[Pair]] = {}
    for plan in plans:
        own = [[(plan.layer, g) for g in part] for part in plan.projected]
        calls = []
        if plan.only_here:
            joined = [own.pop(0) if a == plan.layer else handed.pop((a, plan.layer)) for a in plan.only_here]
            caches.append(sum(joined, []))
            calls.append(caches[-1])
        for reader in plan.shared:
            kept[plan.layer, reader] = own.pop(0)
            caches.append(kept[plan.layer, reader])
            calls.append(caches[-1])
        for reader in plan.handed_on:
            handed[plan.layer, reader] = own.pop(0)
        assert own == []
        calls += [kept.pop((a, plan.layer)) for a in plan.borrowed]
        assert [[g for _, g in call] for call in calls] == plan.calls
        read.append(sum(calls, []))
    assert not handed and not kept
    return read, caches


@given(configurations())
def test_each_group_reads_its_source_and_each_live_pair_is_kept_once(config: SlaGPTConfig) -> None:
    """Sources by the definition: ``layer - distance`` in a layer that skips and has such a layer."""
    groups = range(config.num_key_value_heads)
    read, caches = run(plan_layers(config, list(groups)))

    def source(layer: int, group: int) -> int:
        distances = dict(
            zip(config.sla_skip_groups, config.sla_skip_distances * config.num_key_value_heads, strict=False)
        )
        n = distances.get(group, 0)
        return layer - n if layer in config.sla_layers and layer > n else layer

    layers = range(1, config.num_hidden_layers + 1)
    assert [sorted(pairs, key=lambda pair: pair[1]) for pairs in read] == [
        [(source(layer, g), g) for g in groups] for layer in layers
    ]
    kept = sum(caches, [])
    assert len(kept) == len(set(kept))
    assert set(kept) == {(source(layer, g), g) for layer in layers for g in groups}


@given(configurations(), st.integers(1, 4))
def test_ranks_have_caches_of_the_same_sizes(config: SlaGPTConfig, ranks: int) -> None:
    """As engines want them, and together all groups; where that cannot be, it is refused."""
    counts = [config.distance(g) for g in range(config.num_key_value_heads)]
    if any(counts.count(distance) % ranks for distance in counts):
        with pytest.raises(ValueError, match=f"^tensor_parallel_size={ranks} must divide .* groups"):
            rank_groups(config, ranks)
        return
    shares = rank_groups(config, ranks)
    assert sorted(sum(shares, [])) == list(range(config.num_key_value_heads))
    sizes = [[list(map(len, plan.projected + plan.calls)) for plan in plan_layers(config, share)] for share in shares]
    assert all(size == sizes[0] for size in sizes)


def test_a_model_whose_skipping_layers_all_skip_takes_one_call_a_layer() -> None:
    """But for the first layers, whose groups they read themselves and a later one too."""
    config = tiny(num_key_value_heads=8, sla_skip_distances=[2], sla_skip_groups=[2, 3, 4, 5, 6, 7])
    assert [len(plan.calls) for plan in plan_layers(config, list(range(8)))] == [2, 2, 2, 2, 1, 1]


def test_a_rank_that_cannot_have_its_share_is_told_why() -> None:
    with pytest.raises(ValueError, match=r"3 of this model's 8 key/value groups skip 2 layers$") as refused:
        rank_groups(tiny(num_key_value_heads=8, sla_skip_distances=[2]), 5)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="1 of this model's 4 key/value groups read their own layer"):
        rank_groups(tiny(), 2)
