"""The caches of an engine that has one for each attention module: run with names in the place of keys and values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
from sla_megatron.hf.serving.cache_plan import LayerPlan, plan_layers, rank_groups

from .hf_models import tiny

#: A layer and a group, both as the configuration numbers them, of keys or of values.
Pair = tuple[int, int]
SHARED = {"kv": ("key", "value"), "values": ("value",), "keys": ("key",)}


@st.composite
def configurations(draw: st.DrawFn) -> SlaGPTConfig:
    layers, groups = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    has_distances = draw(st.booleans())
    origins = draw(st.lists(st.integers(1, layers + has_distances), max_size=3))
    return SlaGPTConfig(
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=groups,
        sla_share=draw(st.sampled_from(list(SHARED))),
        sla_skip_distances=origins if has_distances else [],
        sla_source_layers=[] if has_distances else origins,
        sla_skip_groups=sorted(draw(st.sets(st.integers(0, groups - 1)))),
        sla_layers=sorted(draw(st.sets(st.integers(1, layers)))),
    )


def run(plans: list[LayerPlan], kind: str) -> tuple[list[list[Pair]], list[list[Pair]]]:
    """What each layer's attention reads of ``kind``, in the order of its heads, and what each cache holds."""
    read, caches = [], []
    handed: dict[tuple[int, int], list[Pair]] = {}
    kept: dict[tuple[int, int], list[Pair]] = {}
    for plan in plans:
        own = [[(plan.layer, g) for g in part] for part in plan.projected(kind)]
        calls = []
        if plan.is_joined:
            calls = [sum(joined(plan, own, handed), []) if kind in plan.shared_kinds else own.pop(0)]
            caches += calls
        elif plan.only_here:
            parts = [own.pop(0) if a == plan.layer else handed.pop((a, plan.layer)) for a in plan.only_here]
            caches.append(sum(parts, []))
            calls.append(caches[-1])
        if not plan.is_joined:
            for readers in plan.shared:
                part = own.pop(0)
                kept.update({(plan.layer, reader): part for reader in readers})
                caches.append(part)
                calls.append(part)
            for readers in plan.handed_on:
                part = own.pop(0)
                handed.update({(plan.layer, reader): part for reader in readers})
        assert own == []
        calls += [kept.pop((a, plan.layer)) for a in plan.borrowed]
        assert [[g for _, g in call] for call in calls] == plan.calls
        read.append(sum(calls, []))
    assert not handed and not kept
    return read, caches


def joined(plan: LayerPlan, own: list[list[Pair]], handed: dict[tuple[int, int], list[Pair]]) -> list[list[Pair]]:
    """The parts of a layer's only call, of what it takes from others too; its own are handed on."""
    parts = [own.pop(0)] if plan.layer in plan.only_here else []
    for readers in plan.shared:
        parts.append(own.pop(0))
        handed.update({(plan.layer, reader): parts[-1] for reader in readers})
    for readers in plan.handed_on:
        part = own.pop(0)
        handed.update({(plan.layer, reader): part for reader in readers})
    return parts + [handed.pop((a, plan.layer)) for a in plan.only_here if a != plan.layer]


@given(configurations())
def test_each_group_reads_its_source_and_each_live_pair_is_kept_once(config: SlaGPTConfig) -> None:
    """Sources by the definition: ``layer - distance`` or the source layer, in a layer that skips and is behind it.

    Where keys or values are shared alone, a layer keeps all that it reads.
    """
    groups, layers = range(config.num_key_value_heads), range(1, config.num_hidden_layers + 1)
    plans = plan_layers(config, list(groups))
    origins = config.sla_source_layers or config.sla_skip_distances
    origin = dict(zip(config.sla_skip_groups, origins * config.num_key_value_heads, strict=False))

    def source(layer: int, group: int) -> int:
        n = origin.get(group, layer)
        return (n if config.sla_source_layers else layer - n) if layer in config.sla_layers and layer > n else layer

    for kind in ("key", "value"):
        is_shared = kind in SHARED[config.sla_share]
        read, caches = run(plans, kind)
        expected = [[(source(layer, g) if is_shared else layer, g) for g in groups] for layer in layers]
        assert [sorted(pairs, key=lambda pair: pair[1]) for pairs in read] == expected
        if config.sla_share != "kv":
            assert caches == read
            continue
        kept = sum(caches, [])
        assert len(kept) == len(set(kept))
        assert set(kept) == set(sum(expected, []))


@given(configurations(), st.integers(1, 4))
def test_ranks_have_caches_of_the_same_sizes(config: SlaGPTConfig, ranks: int) -> None:
    """As engines want them, and together all groups; where that cannot be, it is refused."""
    counts = [config.origin(g) for g in range(config.num_key_value_heads)]
    if any(counts.count(origin) % ranks for origin in counts):
        with pytest.raises(ValueError, match=f"^tensor_parallel_size={ranks} must divide .* groups"):
            rank_groups(config, ranks)
        return
    shares = rank_groups(config, ranks)
    assert sorted(sum(shares, [])) == list(range(config.num_key_value_heads))
    plans = [plan_layers(config, share) for share in shares]
    parts = [[[*plan.projected("key"), *plan.projected("value"), *plan.calls] for plan in rank] for rank in plans]
    sizes = [[list(map(len, layer)) for layer in rank] for rank in parts]
    assert all(size == sizes[0] for size in sizes)


def test_a_model_whose_skipping_layers_all_skip_takes_one_call_a_layer() -> None:
    """But for the first layers, whose groups they read themselves and a later one too."""
    config = tiny(num_key_value_heads=8, sla_skip_distances=[2], sla_skip_groups=[2, 3, 4, 5, 6, 7])
    assert [len(plan.calls) for plan in plan_layers(config, list(range(8)))] == [2, 2, 2, 2, 1, 1]


def test_a_rank_that_cannot_have_its_share_is_told_why() -> None:
    with pytest.raises(ValueError, match=r"3 of this model's 8 key/value groups skip 2 layers$") as refused:
        rank_groups(tiny(num_key_value_heads=8, sla_skip_distances=[2]), 5)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"each source layer: 3 of this model's 8 key/value groups read layer 2$"):
        rank_groups(tiny(num_key_value_heads=8, sla_skip_distances=[], sla_source_layers=[2]), 5)
    with pytest.raises(ValueError, match="1 of this model's 4 key/value groups read their own layer"):
        rank_groups(tiny(), 2)
