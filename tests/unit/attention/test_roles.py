"""The layers' roles, played through with labels in place of tensors: all read what the definition says."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.attention.roles import LayerRole, Shared
from sla_megatron.attention.sla_config import SLAConfig

from ..strategies import sla_configs

#: Stands for the K/V that a layer projected for a group: (layer, group), groups counted over the model.
Label = tuple[int, int]


@st.composite
def sharded(draw: st.DrawFn) -> tuple[SLAConfig, int]:
    """A configuration and a tensor-parallel size that divides its groups."""
    size = draw(st.sampled_from([1, 2, 4]))
    sla = draw(sla_configs(st.integers(1, 4).map(lambda share: share * size)))
    return sla, size


def play(sla: SLAConfig, size: int, rank: int) -> tuple[dict[Label, Label], Counter, Counter]:
    """One rank's forward, as attention does it: who read whose K/V, each bundle's puts, and its takes."""
    first = sla.rank_groups(size, rank).start
    reads: dict[Label, Label] = {}
    put: Counter[Shared] = Counter()
    taken: Counter[Shared] = Counter()
    waiting: dict[Shared, tuple[Label, ...]] = {}
    for layer in range(1, sla.num_layers + 1):
        role = LayerRole.of(sla, layer, size, rank)
        own = [(layer, first + position) for position in role.projected]
        for name, indices in role.puts.items():
            waiting[name] = tuple(own[i] for i in indices)
            put[name] += 1
        pieces = {None: own}
        for name in role.takes:
            pieces[name] = waiting.pop(name)
            taken[name] += 1
        for position, (origin, i) in enumerate(role.read):
            reads[(layer, first + position)] = pieces[origin][i]
    assert not waiting
    return reads, put, taken


@given(sharded())
def test_every_group_reads_its_source(sharded_model: tuple[SLAConfig, int]) -> None:
    """Over all ranks, every (layer, group) reads the K/V that its source layer projected for that group."""
    sla, size = sharded_model
    reads: dict[Label, Label] = {}
    for rank in range(size):
        on_rank = play(sla, size, rank)[0]
        assert not reads.keys() & on_rank.keys()
        reads |= on_rank
    every_layer, every_group = range(1, sla.num_layers + 1), range(sla.num_query_groups)
    assert reads == {(m, g): (sla.source(m, g), g) for m in every_layer for g in every_group}


@given(sharded())
def test_every_bundle_is_put_once_and_taken_once(sharded_model: tuple[SLAConfig, int]) -> None:
    """On each rank the bundles that are put are those that are taken, once each, by source and reader."""
    sla, size = sharded_model
    for rank in range(size):
        _, put, taken = play(sla, size, rank)
        assert put == taken
        assert set(put.values()) <= {1}
        for layer in range(1, sla.num_layers + 1):
            role = LayerRole.of(sla, layer, size, rank)
            for source, (reader,) in role.puts:
                assert source == layer and reader - source in sla.skip_distances
            assert all(readers == (layer,) for _, readers in role.takes)


@given(sharded())
def test_nothing_is_handed_over_that_nobody_reads(sharded_model: tuple[SLAConfig, int]) -> None:
    """A bundle is no larger than what its reader reads of it: no K/V travel, or stay alive, for nothing."""
    sla, size = sharded_model
    for rank in range(size):
        roles = {m: LayerRole.of(sla, m, size, rank) for m in range(1, sla.num_layers + 1)}
        for role in roles.values():
            for shared, indices in role.puts.items():
                read = [i for origin, i in roles[shared.readers[0]].read if origin == shared]
                assert sorted(read) == list(range(len(indices)))


@given(sharded())
def test_the_ranks_project_the_model_s_projected_groups(sharded_model: tuple[SLAConfig, int]) -> None:
    """The ranks' projected groups together are the model's; ``pruned`` leaves out exactly the dead ones."""
    sla, size = sharded_model
    for layer in range(1, sla.num_layers + 1):
        together = [
            sla.rank_groups(size, rank).start + position
            for rank in range(size)
            for position in LayerRole.of(sla, layer, size, rank).projected
        ]
        live = [g for g in range(sla.num_query_groups) if sla.is_live(layer, g)]
        assert together == (live if sla.kv_projection == "pruned" else list(range(sla.num_query_groups)))


@given(sharded())
def test_reads_nothing_of_its_own(sharded_model: tuple[SLAConfig, int]) -> None:
    """It is said of exactly the layers that project K/V on this rank, none of them live."""
    sla, size = sharded_model
    for rank in range(size):
        groups = sla.rank_groups(size, rank)
        for layer in range(1, sla.num_layers + 1):
            role = LayerRole.of(sla, layer, size, rank)
            expected = bool(role.projected) and not any(sla.is_live(layer, g) for g in groups)
            assert role.reads_nothing_of_its_own == expected


@pytest.mark.parametrize("mode", ["full", "pruned"])
def test_the_paper_s_model_on_four_ranks(mode: str) -> None:
    """12 layers, 12 heads, distance 9, TP=4: each rank hands its own skip heads from layer 1 to layer 10."""
    sla = SLAConfig(12, 12, (9,), 9, kv_projection=mode)
    for rank in range(4):
        role = LayerRole.of(sla, 10, 4, rank)
        skips = [g for g in sla.rank_groups(4, rank) if g % 4]
        assert LayerRole.of(sla, 1, 4, rank).puts == {(1, (10,)): tuple(g - 3 * rank for g in skips)}
        assert role.takes == ((1, (10,)),)
        assert LayerRole.of(sla, 5, 4, rank).takes == ()
        assert len(role.projected) == (3 if mode == "full" else 3 - len(skips))


def test_two_distances_make_two_bundles() -> None:
    """Groups that share a distance travel together, and one layer may read two layers."""
    sla = SLAConfig(6, 4, (2, 3), 4)
    assert LayerRole.of(sla, 1).puts == {(1, (3,)): (0, 2), (1, (4,)): (1, 3)}
    assert LayerRole.of(sla, 4).takes == ((2, (4,)), (1, (4,)))
    assert LayerRole.of(sla, 4).read == (((2, (4,)), 0), ((1, (4,)), 0), ((2, (4,)), 1), ((1, (4,)), 1))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_dense_model_hands_nothing_over(layer: int) -> None:
    """Without skip heads each layer projects and reads its own groups in order."""
    role = LayerRole.of(SLAConfig(3, 4, (3,), 4), layer, 2, 1)
    assert (role.projected, role.puts, role.takes) == ((0, 1), {}, ())
    assert role.read == ((None, 0), (None, 1))
