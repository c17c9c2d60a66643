"""Which pieces of keys and values are cut, handed on and joined, against the roles that they come from."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.attention.microbatch_kv import Bundle, MicrobatchKV
from sla_megatron.attention.pieces import Pieces
from sla_megatron.attention.roles import LayerRole
from sla_megatron.attention.sla_config import SLAConfig

from ..strategies import sla_configs


def test_the_default_pattern() -> None:
    """NSSS NSSS NSSS: three pieces that go to layer 10, in the source and in the reader."""
    sla = SLAConfig(12, 12, (9,), 9)
    source = Pieces.of(LayerRole.of(sla, 1), merged=True)
    assert source.own_sizes == (1, 3, 1, 3, 1, 3)
    assert source.put_pieces == {(1, 9): (1, 3, 5)} and source.taken_sizes == {} and source.read_pieces[0] == (None, 0)
    reader = Pieces.of(LayerRole.of(sla, 10), merged=True)
    assert reader.own_sizes == (1, 3, 1, 3, 1, 3) and reader.put_pieces == {}
    assert reader.taken_sizes == {(1, 9): (3, 3, 3)}
    assert reader.read_pieces == ((None, 0), ((1, 9), 0), (None, 2), ((1, 9), 1), (None, 4), ((1, 9), 2))


def test_a_layer_between_has_one_piece() -> None:
    assert Pieces.of(LayerRole.of(SLAConfig(12, 12, (9,), 9), 5), merged=True).own_sizes == (12,)


def test_pruned_projections_are_cut_group_by_group() -> None:
    sla = SLAConfig(4, 4, (3,), 3, kv_projection="pruned")
    pieces = Pieces.of(LayerRole.of(sla, 4), merged=False)
    assert pieces.own_sizes == (1,) and pieces.taken_sizes == {(1, 3): (3,)}
    assert pieces.read_pieces == ((None, 0), ((1, 3), 0))


@given(sla_configs(), st.booleans(), st.booleans())
def test_every_layer_reads_the_groups_that_the_formula_names(sla: SLAConfig, merged: bool, whole: bool) -> None:
    """Each group's K/V carry its number and its layer's; ``whole``: bundles pass through memory of their own."""
    merged = merged and sla.kv_projection == "full"
    kv = MicrobatchKV()
    for layer in range(1, sla.num_layers + 1):
        role = LayerRole.of(sla, layer)
        pieces = Pieces.of(role, merged)
        groups = sla.projected_groups(layer)
        own = torch.tensor([[layer, group] for group in groups], dtype=torch.float).reshape(1, 1, -1, 2)
        cut = own.split(list(pieces.own_sizes), dim=2)
        for name, indices in pieces.put_pieces.items():
            kv.put(name, Bundle([cut[i] for i in indices], [-cut[i] for i in indices]))
        parts = {None: Bundle(cut, [-piece for piece in cut])}
        for name, sizes in pieces.taken_sizes.items():
            if whole:
                kv.put(name, Bundle(*([tensor] for tensor in kv.take(name).joined())))
            parts[name] = kv.take(name).cut(sizes)
        key = torch.cat([parts[origin].keys[i] for origin, i in pieces.read_pieces], dim=2)
        value = torch.cat([parts[origin].values[i] for origin, i in pieces.read_pieces], dim=2)
        expected = [[sla.source(layer, group), group] for group in range(sla.num_query_groups)]
        assert key[0, 0].tolist() == expected
        assert torch.equal(value, -key)
    kv.require_empty()
