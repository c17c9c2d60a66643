"""Bundles as the tensors that a checkpoint takes and returns, and back."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.attention.microbatch_kv import Bundle, MicrobatchKV


@pytest.fixture(scope="module")
def recomputation(megatron_imported: None) -> ModuleType:
    """The module, once Megatron can be imported."""
    from sla_megatron.model import recomputation

    return recomputation


def bundle(value: float) -> Bundle:
    """A key and a value of one group, distinguishable from others and from each other."""
    return Bundle([torch.full((2, 1, 1, 4), value)], [torch.full((2, 1, 1, 4), -value)])


@given(st.sets(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=6).map(sorted))
def test_put_reverses_take(recomputation: ModuleType, names: list[tuple[int, int]]) -> None:
    """Key and value in turn, in the order of the names, and back into the same bundles."""
    bundles = {name: bundle(index) for index, name in enumerate(names)}
    kv = MicrobatchKV(bundles)
    tensors = recomputation.take_tensors(kv, names)
    kv.require_empty()
    assert [id(tensor) for tensor in tensors] == [
        id(tensor) for name in names for tensor in (*bundles[name].keys, *bundles[name].values)
    ]
    recomputation.put_tensors(kv, names, tensors)
    for name in names:
        found = kv.take(name)
        assert found.keys[0] is bundles[name].keys[0] and found.values[0] is bundles[name].values[0]


@pytest.mark.parametrize("num_tensors", [0, 1, 3, 4])
def test_put_needs_two_tensors_a_name(recomputation: ModuleType, num_tensors: int) -> None:
    """Tensors that do not match the names raise."""
    with pytest.raises(ValueError, match="zip"):
        recomputation.put_tensors(MicrobatchKV(), [(1, 2)], [torch.zeros(1)] * num_tensors)
