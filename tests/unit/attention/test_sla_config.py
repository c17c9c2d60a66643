"""SLAConfig against a brute force of its definition, on shapes that hypothesis chooses."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.attention.sla_config import (
    SLAConfig,
    compact_ranges,
    default_num_skip_groups,
    default_skip_distance,
    evenly_spread,
)
from sla_megatron.common.errors import FlagError
from sla_megatron.flags.skipping import parse_layers

from ..strategies import sla_configs

# The brute force: the definition's own formulas, in exact fractions, and no call of the code under test.


def brute_skip_groups(k: int, groups: int) -> list[int]:
    """g in S <=> floor((g+1) * k / G) > floor(g * k / G)."""
    return [g for g in range(groups) if floor(Fraction((g + 1) * k, groups)) > floor(Fraction(g * k, groups))]


def brute_source(sla: SLAConfig, layer: int, group: int) -> int:
    """source(l, g) = l - n if g in S, l in C and l > n, else l; the j-th skip group has n_{j mod D}."""
    skipping = brute_skip_groups(sla.num_skip_groups, sla.num_query_groups)
    if group not in skipping:
        return layer
    n = sla.skip_distances[skipping.index(group) % len(sla.skip_distances)]
    chosen = sla.layers is None or layer in sla.layers
    return layer - n if chosen and layer > n else layer


def brute_readers(sla: SLAConfig, layer: int, group: int) -> list[int]:
    """The later layers m with source(m, g) = l."""
    return [m for m in range(layer + 1, sla.num_layers + 1) if brute_source(sla, m, group) == layer]


def brute_is_live(sla: SLAConfig, layer: int, group: int) -> bool:
    """The layer itself uses it, or some later layer does."""
    return brute_source(sla, layer, group) == layer or bool(brute_readers(sla, layer, group))


def every_place(sla: SLAConfig) -> list[tuple[int, int]]:
    """All (layer, group) pairs."""
    return [(m, g) for m in range(1, sla.num_layers + 1) for g in range(sla.num_query_groups)]


#: Skip groups and all groups, with as many as a large model has.
counts = st.integers(1, 200).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))

# Which groups skip.


@given(counts)
def test_the_pattern_is_the_definition_s(count_and_total: tuple[int, int]) -> None:
    """The skip groups are those of the floor formula, and exactly as many as asked for."""
    assert list(evenly_spread(*count_and_total)) == brute_skip_groups(*count_and_total)
    assert len(evenly_spread(*count_and_total)) == count_and_total[0]


@given(counts, st.data())
def test_the_pattern_is_evenly_spread(count_and_total: tuple[int, int], data: st.DataObject) -> None:
    """Any two windows of the same length hold equally many skip groups, give or take one."""
    total = count_and_total[1]
    skips = set(evenly_spread(*count_and_total))
    length = data.draw(st.integers(1, total), label="window length")
    held = [len(skips.intersection(range(start, start + length))) for start in range(total - length + 1)]
    assert max(held) - min(held) <= 1


@given(st.integers(1, 12), st.integers(1, 8), st.data())
def test_the_pattern_does_not_depend_on_the_tensor_parallel_size(
    share: int, tensor_parallel_size: int, data: st.DataObject
) -> None:
    """The ranks' groups, in order of the rank, are the model's groups once each; so are their patterns."""
    groups = share * tensor_parallel_size
    sla = SLAConfig(4, groups, (2,), data.draw(st.integers(0, groups), label="skip groups"))
    ranks = [sla.rank_groups(tensor_parallel_size, rank) for rank in range(tensor_parallel_size)]
    assert [g for rank in ranks for g in rank] == list(range(groups))
    pattern = sla.pattern()
    assert pattern == "".join(
        "S" if g in brute_skip_groups(sla.num_skip_groups, groups) else "N" for rank in ranks for g in rank
    )
    assert "".join(pattern[rank.start : rank.stop] for rank in ranks) == pattern


def test_the_paper_s_model() -> None:
    """12 layers and 12 heads: distance 9, nine skip heads as NSSS NSSS NSSS, consumers 10-12, sources 1-3."""
    sla = SLAConfig(12, 12, (default_skip_distance(12),), default_num_skip_groups(12))
    assert (sla.skip_distances, sla.num_skip_groups) == ((9,), 9)
    assert sla.pattern() == "NSSS" * 3
    assert sla.consumer_layers == (10, 11, 12)
    assert [sla.source(layer, 1) for layer in range(1, 13)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    assert [sla.source(layer, 0) for layer in range(1, 13)] == list(range(1, 13))
    assert (sla.num_dead, sla.live_groups(12), sla.live_groups(9)) == (27, (0, 4, 8), tuple(range(12)))


def test_the_other_reading_of_nine_skip_layers() -> None:
    """Distance 1 in layers 4-12: each reads the layer before it, and layer 3 is read by layer 4 alone."""
    sla = SLAConfig(12, 12, (1,), 9, layers=parse_layers("4-12", 12))
    assert sla.consumer_layers == tuple(range(4, 13))
    assert [sla.source(layer, 1) for layer in range(1, 13)] == [1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    # Only the last layer's own K/V are read by nobody.
    assert [layer for layer in range(1, 13) if len(sla.live_groups(layer)) < 12] == [12]


@pytest.mark.parametrize(
    ("total", "rounded"), [(1, 1), (2, 2), (3, 2), (4, 3), (6, 4), (8, 6), (10, 8), (12, 9), (32, 24)]
)
def test_the_defaults_are_three_quarters_rounded(total: int, rounded: int) -> None:
    """Both defaults are round(0.75 x), as Python rounds."""
    assert (default_skip_distance(total), default_num_skip_groups(total)) == (rounded, rounded)


# What reads what.


@given(sla_configs())
def test_source_is_the_definition_s(sla: SLAConfig) -> None:
    """Every group of every layer reads the layer that the definition says."""
    assert {p: sla.source(*p) for p in every_place(sla)} == {p: brute_source(sla, *p) for p in every_place(sla)}


@given(sla_configs())
def test_consumer_is_the_one_later_reader(sla: SLAConfig) -> None:
    """No K/V have more than one later reader, and ``consumer`` names that one."""
    for place in every_place(sla):
        readers = brute_readers(sla, *place)
        assert len(readers) <= 1
        assert sla.consumer(*place) == (readers[0] if readers else None)


@given(sla_configs())
def test_live_groups_are_those_that_something_reads(sla: SLAConfig) -> None:
    """A group is live where its own layer or a later one uses it; ``pruned`` projects only these."""
    dead = 0
    for layer in range(1, sla.num_layers + 1):
        live = [g for g in range(sla.num_query_groups) if brute_is_live(sla, layer, g)]
        dead += sla.num_query_groups - len(live)
        assert [g for g in range(sla.num_query_groups) if sla.is_live(layer, g)] == live
        assert list(sla.live_groups(layer)) == live
        everything = list(range(sla.num_query_groups))
        assert list(sla.projected_groups(layer)) == (live if sla.kv_projection == "pruned" else everything)
    assert sla.num_dead == dead


@given(sla_configs())
def test_consumer_layers_are_those_where_something_skips(sla: SLAConfig) -> None:
    """``consumer_layers`` are the layers with a skip head, and a model without one is dense."""
    skipping = sorted({layer for layer, g in every_place(sla) if brute_source(sla, layer, g) != layer})
    assert list(sla.consumer_layers) == skipping
    assert sla.is_dense == (not skipping)


@pytest.mark.parametrize("num_skip_groups", [3, 4, 5, 6])
def test_several_distances_take_turns(num_skip_groups: int) -> None:
    """The j-th skip group has the (j mod D)-th distance."""
    sla = SLAConfig(12, 6, (2, 5, 7), num_skip_groups)
    expected = dict(zip(brute_skip_groups(num_skip_groups, 6), [2, 5, 7, 2, 5, 7], strict=False))
    assert sla.distance_of_group == expected
    assert {g: 12 - sla.source(12, g) for g in expected} == expected


@given(sla_configs())
def test_one_distance_is_the_same_as_several_equal_ones(sla: SLAConfig) -> None:
    """Repeating a distance changes nothing."""
    once = dataclasses.replace(sla, skip_distances=sla.skip_distances[:1])
    thrice = dataclasses.replace(sla, skip_distances=sla.skip_distances[:1] * 3)
    assert [once.source(*p) for p in every_place(sla)] == [thrice.source(*p) for p in every_place(sla)]


@pytest.mark.parametrize(
    "sla",
    [
        pytest.param(SLAConfig(4, 4, (4,), 3), id="distance-is-L"),
        pytest.param(SLAConfig(4, 4, (99,), 4), id="distance-beyond-L"),
        pytest.param(SLAConfig(4, 4, (1,), 0), id="no-skip-groups"),
        pytest.param(SLAConfig(4, 4, (1,), 3, layers=()), id="no-consumer-layers"),
        pytest.param(SLAConfig(4, 4, (3,), 3, layers=(1, 2, 3)), id="consumers-not-beyond-the-distance"),
    ],
)
def test_dense(sla: SLAConfig) -> None:
    """Nothing skips, so every layer reads its own K/V and nothing is dead, whatever the projection mode."""
    for mode in ("full", "pruned"):
        same = dataclasses.replace(sla, kv_projection=mode)
        assert same.is_dense
        assert all(same.source(layer, group) == layer for layer, group in every_place(same))
        assert same.num_dead == 0
        assert all(same.projected_groups(layer) == (0, 1, 2, 3) for layer in range(1, 5))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        pytest.param({"num_layers": 0}, "one layer", id="no-layers"),
        pytest.param({"num_query_groups": 0, "num_skip_groups": 0}, "one group", id="no-groups"),
        pytest.param({"skip_distances": ()}, "skip_distances", id="no-distance"),
        pytest.param({"skip_distances": (2, 0)}, "skip_distances", id="distance-0"),
        pytest.param({"num_skip_groups": -1}, "num_skip_groups", id="fewer-than-no-skip-groups"),
        pytest.param({"num_skip_groups": 5}, "num_skip_groups", id="more-skip-groups-than-groups"),
        pytest.param({"layers": (0,)}, "layers", id="layer-0"),
        pytest.param({"layers": (7,)}, "layers", id="layer-beyond-L"),
        pytest.param({"kv_projection": "none"}, "kv_projection", id="unknown-projection"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, object], named: str) -> None:
    """A ValueError that names the value; the same configuration without it is accepted."""
    good = {"num_layers": 6, "num_query_groups": 4, "skip_distances": (2,), "num_skip_groups": 3}
    SLAConfig(**good)
    with pytest.raises(ValueError, match=named):
        SLAConfig(**{**good, **wrong})


# The syntax of layer ranges.


@given(st.sets(st.integers(1, 40), min_size=1).map(sorted))
def test_ranges_read_back_as_the_same_layers(layers: list[int]) -> None:
    """``compact_ranges`` writes what ``parse_layers`` reads, with no two parts that could be one."""
    text = compact_ranges(layers)
    assert parse_layers(text, 40) == tuple(layers)
    parts = [tuple(map(int, part.split("-"))) for part in text.split(",")]
    assert all(after[0] > before[-1] + 1 for before, after in zip(parts, parts[1:], strict=False))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("10-12", (10, 11, 12)),
        ("4,6,8-12", (4, 6, 8, 9, 10, 11, 12)),
        ("7", (7,)),
        (" 3 - 4 , 1 ", (1, 3, 4)),
        ("2-4,3-5,4", (2, 3, 4, 5)),
        ("5-5", (5,)),
    ],
)
def test_layer_ranges(text: str, layers: tuple[int, ...]) -> None:
    """Single layers and inclusive ranges, in any order, with overlaps and spaces."""
    assert parse_layers(text, 12) == layers


@pytest.mark.parametrize("text", ["", ",", "0", "13", "0-3", "11-13", "5-4", "-3", "3-", "1.5", "a", "1;2", "1,,2"])
def test_layer_ranges_refused(text: str) -> None:
    """What is no range, or not within the model, is refused with the flag's name and the model's range."""
    with pytest.raises(FlagError, match="--sla-layers.*within 1-12"):
        parse_layers(text, 12)
