"""K/V between nodes with graphs of their own, run backward one by one, against one graph of torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sla_megatron.attention.microbatch_kv import Bundle, MicrobatchKV

pytestmark = pytest.mark.usefixtures("megatron")

NAME = (1, 2)


def source(weights: Tensor) -> tuple[Tensor, Bundle]:
    """Hidden states, and a bundle whose keys lie in two pieces."""
    pieces = [(weights * factor).view(3, 1, 1, 2) for factor in (2.0, 3.0, 5.0)]
    return weights.tanh(), Bundle(pieces[:2], pieces[2:])


def reader(hidden_states: Tensor, bundle: Bundle) -> Tensor:
    first, second = bundle.keys
    (value,) = bundle.values
    return hidden_states * (first * second.exp() + value.sin()).view_as(hidden_states)


def test_gradients_are_those_of_one_graph() -> None:
    from sla_megatron.model.schedule_plan import _BetweenNodes

    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(3, 2, generator=generator, requires_grad=True)
    gradient = torch.randn(3, 2, generator=generator)
    expected = reader(*source(weights))
    (expected_gradient,) = torch.autograd.grad(expected, weights, gradient)

    between, kv = _BetweenNodes(), MicrobatchKV()
    hidden_states, bundle = source(weights)
    kv.put(NAME, bundle)
    output = between.keep(kv, [NAME], hidden_states)
    node_input = output.detach().requires_grad_()
    between.fetch(kv, [NAME], node_input)
    found = reader(node_input, kv.take(NAME))
    between.require_read()
    kv.require_empty()
    assert torch.equal(found, expected)
    # As a schedule does: the reader's node first, then the source's with what it found for its output.
    found.backward(gradient)
    assert weights.grad is None
    output.backward(node_input.grad)
    torch.testing.assert_close(weights.grad, expected_gradient)


def test_each_bundle_has_one_reader() -> None:
    from sla_megatron.model.schedule_plan import _BetweenNodes

    between, kv = _BetweenNodes(), MicrobatchKV()
    hidden_states, bundle = source(torch.ones(3, 2, requires_grad=True))
    kv.put(NAME, bundle)
    output = between.keep(kv, [NAME], hidden_states)
    with pytest.raises(RuntimeError, match=r"1 of 1 resident bundles were not fetched .* layer 1 \(distance 2\)"):
        between.require_read()
    between.fetch(kv, [NAME], output)
    with pytest.raises(RuntimeError, match=r"layer 1 \(distance 2\).*fetched, cannot be fetched"):
        between.fetch(kv, [NAME], output)
    with pytest.raises(RuntimeError, match=r"layer 4 needs skip-layer K/V of layer 2 \(distance 2\)"):
        between.fetch(kv, [(2, 2)], output)
