"""The layers' roles, played through with labels in place of tensors: all read what the definition says."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.attention.roles import LayerRole, SharedTensor
from sla_megatron.attention.sla_config import SLAConfig

from ..strategies import sla_configs

#: Stands for the keys or the values that a layer projected for a group: (layer, group), groups counted over the model.
Label = tuple[int, int]

kinds = pytest.mark.parametrize("kind", ["key", "value"])


@st.composite
def sharded(draw: st.DrawFn) -> tuple[SLAConfig, int]:
    """A configuration and a tensor-parallel size that divides its groups."""
    size = draw(st.sampled_from([1, 2, 4]))
    sla = draw(sla_configs(st.integers(1, 4).map(lambda share: share * size)))
    return sla, size


def every_layer(sla: SLAConfig, size: int, rank: int) -> list[tuple[int, LayerRole]]:
    return [(layer, LayerRole.of(sla, layer, size, rank)) for layer in range(1, sla.num_layers + 1)]


def play(sla: SLAConfig, size: int, rank: int, kind: str) -> tuple[dict[Label, Label], Counter, Counter]:
    """One rank's forward, as attention does it: who read whose tensor, what was put, and what was taken."""
    first = sla.rank_groups(size, rank).start
    reads: dict[Label, Label] = {}
    put: Counter[SharedTensor] = Counter()
    taken: Counter[SharedTensor] = Counter()
    waiting: dict[SharedTensor, tuple[Label, ...]] = {}
    for layer, both in every_layer(sla, size, rank):
        role = getattr(both, kind)
        own = [(layer, first + position) for position in role.projected]
        for shared, indices in role.puts.items():
            waiting[shared] = tuple(own[i] for i in indices)
            put[shared] += 1
        pieces = {None: own}
        for shared in role.takes:
            pieces[shared] = waiting[shared]
            taken[shared] += 1
        for position, (origin, i) in enumerate(role.read):
            reads[(layer, first + position)] = pieces[origin][i]
    return reads, put, taken


@kinds
@given(sharded_model=sharded())
def test_every_group_reads_its_source(kind: str, sharded_model: tuple[SLAConfig, int]) -> None:
    """Over all ranks, every (layer, group) reads the tensor that its source layer projected for that group."""
    sla, size = sharded_model
    reads: dict[Label, Label] = {}
    for rank in range(size):
        on_rank = play(sla, size, rank, kind)[0]
        assert not reads.keys() & on_rank.keys()
        reads |= on_rank
    layers, groups = range(1, sla.num_layers + 1), range(sla.num_query_groups)
    assert reads == {(m, g): (sla.source_of(m, g, kind), g) for m in layers for g in groups}


@kinds
@given(sharded_model=sharded())
def test_every_tensor_is_put_once_and_taken_by_each_of_its_readers(
    kind: str, sharded_model: tuple[SLAConfig, int]
) -> None:
    """On each rank what is put is what is taken, by the layers that it names and by no others."""
    sla, size = sharded_model
    for rank in range(size):
        _, put, taken = play(sla, size, rank, kind)
        assert set(put.values()) <= {1}
        assert taken == {shared: len(shared.readers) for shared in put}
        for layer, both in every_layer(sla, size, rank):
            role = getattr(both, kind)
            for shared in role.puts:
                assert (shared.kind, shared.source) == (kind, layer)
                assert layer < shared.readers[0] and list(shared.readers) == sorted(set(shared.readers))
            assert all(layer in shared.readers for shared in role.takes)
            assert len(set(role.takes)) == len(role.takes)


@kinds
@given(sharded_model=sharded())
def test_nothing_is_handed_over_that_nobody_reads(kind: str, sharded_model: tuple[SLAConfig, int]) -> None:
    """Each of its readers reads all of it: nothing travels, or stays alive, for nothing."""
    sla, size = sharded_model
    for rank in range(size):
        roles = {layer: getattr(role, kind) for layer, role in every_layer(sla, size, rank)}
        for role in roles.values():
            for shared, indices in role.puts.items():
                for reader in shared.readers:
                    read = [i for origin, i in roles[reader].read if origin == shared]
                    assert sorted(read) == list(range(len(indices)))


@given(sharded())
def test_what_is_own_is_neither_put_nor_taken(sharded_model: tuple[SLAConfig, int]) -> None:
    """Without a share in keys they stay where they are, as do values."""
    sla, size = sharded_model
    for rank in range(size):
        for _, both in every_layer(sla, size, rank):
            assert both.takes == both.key.takes + both.value.takes
            assert both.puts == (*both.key.puts, *both.value.puts)
            for share, own in (("values", both.key), ("keys", both.value)):
                if sla.share == share:
                    assert not own.takes and not own.puts
                    assert own.read == tuple((None, i) for i in range(len(own.read)))


@kinds
@given(sharded_model=sharded())
def test_the_ranks_project_the_model_s_projected_groups(kind: str, sharded_model: tuple[SLAConfig, int]) -> None:
    """The ranks' projected groups together are the model's; ``pruned`` leaves out exactly the dead ones."""
    sla, size = sharded_model
    for layer in range(1, sla.num_layers + 1):
        together = [
            sla.rank_groups(size, rank).start + position
            for rank in range(size)
            for position in getattr(LayerRole.of(sla, layer, size, rank), kind).projected
        ]
        live = [g for g in range(sla.num_query_groups) if sla.is_live(layer, g, kind)]
        assert together == (live if sla.kv_projection == "pruned" else list(range(sla.num_query_groups)))


@pytest.mark.parametrize("mode", ["full", "pruned"])
def test_the_paper_s_model_on_four_ranks(mode: str) -> None:
    """12 layers, 12 heads, distance 9, TP=4: each rank hands its own skip heads from layer 1 to layer 10."""
    sla = SLAConfig(12, 12, (9,), 9, kv_projection=mode)
    for rank in range(4):
        first, role = LayerRole.of(sla, 1, 4, rank), LayerRole.of(sla, 10, 4, rank)
        skips = tuple(g - 3 * rank for g in sla.rank_groups(4, rank) if g % 4)
        assert first.key.puts == {("key", 1, (10,)): skips}
        assert first.value.puts == {("value", 1, (10,)): skips}
        assert role.takes == (("key", 1, (10,)), ("value", 1, (10,)))
        assert LayerRole.of(sla, 5, 4, rank).takes == ()
        assert [len(of_kind.projected) for of_kind in role.both] == [3 if mode == "full" else 3 - len(skips)] * 2


def test_two_distances_make_two_tensors_of_each_kind() -> None:
    """Groups that share a distance travel together, and one layer may read two layers."""
    sla = SLAConfig(6, 4, (2, 3), 4)
    assert LayerRole.of(sla, 1).key.puts == {("key", 1, (3,)): (0, 2), ("key", 1, (4,)): (1, 3)}
    role = LayerRole.of(sla, 4).value
    near, far = ("value", 2, (4,)), ("value", 1, (4,))
    assert role.takes == (near, far)
    assert role.read == ((near, 0), (far, 0), (near, 1), (far, 1))


@pytest.mark.parametrize("mode", ["full", "pruned"])
def test_skipv1former(mode: str) -> None:
    """One tensor, of half of the values, for all later layers; each has its own keys, and half of its values."""
    sla = SLAConfig(4, 4, (), 2, kv_projection=mode, share="values", source_layers=(1,))
    first, last = LayerRole.of(sla, 1), LayerRole.of(sla, 4)
    one = SharedTensor("value", 1, (2, 3, 4))
    assert first.puts == last.takes == (one,)
    assert first.value.puts == {one: (1, 3)}
    assert last.key.projected == first.key.projected == first.value.projected == (0, 1, 2, 3)
    full = mode == "full"
    assert last.value.projected == ((0, 1, 2, 3) if full else (0, 2))
    assert last.value.read == ((None, 0), (one, 0), (None, 2 if full else 1), (one, 1))
    assert str(one) == "skip-layer values of attention layer 1 for layers 2,3,4"


def test_two_source_layers() -> None:
    """The later one reads the earlier one too."""
    sla = SLAConfig(4, 2, (), 2, layers=(2, 3, 4), source_layers=(1, 2))
    assert LayerRole.of(sla, 1).key.puts == {("key", 1, (2, 3, 4)): (0,)}
    assert LayerRole.of(sla, 2).key.puts == {("key", 2, (3, 4)): (1,)}
    # Layer 2 reads layer 1 for one group, and has its own of the other, which it hands on.
    assert LayerRole.of(sla, 2).key.read == ((("key", 1, (2, 3, 4)), 0), (None, 1))
    assert LayerRole.of(sla, 4).key.takes == (("key", 1, (2, 3, 4)), ("key", 2, (3, 4)))


@pytest.mark.parametrize("share", ["kv", "values", "keys"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_dense_model_hands_nothing_over(layer: int, share: str) -> None:
    """Without skip heads each layer projects and reads its own groups in order."""
    role = LayerRole.of(SLAConfig(3, 4, (3,), 4, share=share), layer, 2, 1)
    assert (role.puts, role.takes) == ((), ())
    for of_kind in role.both:
        assert (of_kind.projected, of_kind.read) == ((0, 1), ((None, 0), (None, 1)))
