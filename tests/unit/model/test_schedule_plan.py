"""K/V between nodes with graphs of their own, run backward one by one, against one graph of torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sla_megatron.pipeline.waiting import Microbatch

pytestmark = pytest.mark.usefixtures("megatron")


def source(weights: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Hidden states, and two tensors, one of which lies in two pieces."""
    pieces = [(weights * factor).view(3, 1, 1, 2) for factor in (2.0, 3.0, 5.0)]
    return weights.tanh(), {"keys": pieces[:2], "values": pieces[2:]}


def reader(hidden_states: Tensor, tensors: dict[str, list[Tensor]]) -> Tensor:
    first, second = tensors["keys"]
    (value,) = tensors["values"]
    return hidden_states * (first * second.exp() + value.sin()).view_as(hidden_states)


@pytest.mark.parametrize("readers", [1, 2])
def test_gradients_are_those_of_one_graph(readers: int) -> None:
    from sla_megatron.model.schedule_plan import _BetweenNodes

    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(3, 2, generator=generator, requires_grad=True)
    gradient = torch.randn(3, 2, generator=generator)
    hidden_states, tensors = source(weights)
    for _ in range(readers):
        hidden_states = reader(hidden_states, tensors)
    expected = hidden_states
    (expected_gradient,) = torch.autograd.grad(expected, weights, gradient)

    between, held = _BetweenNodes({"keys": readers, "values": readers}), Microbatch()
    hidden_states, tensors = source(weights)
    for name, pieces in tensors.items():
        held.put(name, pieces)
    nodes = [(None, between.keep(held, tensors, hidden_states))]
    for _ in range(readers):
        node_input = nodes[-1][1].detach().requires_grad_()
        between.fetch(held, tensors, node_input)
        nodes.append((node_input, reader(node_input, {name: held.take(name) for name in tensors})))
    between.require_read()
    held.require_empty()
    assert torch.equal(nodes[-1][1], expected)
    # As a schedule does: the last reader's node first, then each other's with what was found for its output.
    for node_input, output in reversed(nodes):
        assert weights.grad is None
        output.backward(gradient)
        gradient = None if node_input is None else node_input.grad
    torch.testing.assert_close(weights.grad, expected_gradient)


def test_each_tensor_finds_its_readers() -> None:
    from sla_megatron.model.schedule_plan import _BetweenNodes

    between, held = _BetweenNodes({"keys": 1, "values": 1}), Microbatch()
    hidden_states, tensors = source(torch.ones(3, 2, requires_grad=True))
    for name, pieces in tensors.items():
        held.put(name, pieces)
    output = between.keep(held, tensors, hidden_states)
    with pytest.raises(RuntimeError, match="3 of 3 resident tensors were not fetched .*keys"):
        between.require_read()
    between.fetch(held, ["keys"], output)
    with pytest.raises(RuntimeError, match="keys.*fetched, cannot be fetched"):
        between.fetch(held, ["keys"], output)
    with pytest.raises(RuntimeError, match="others.* a stage needs it"):
        between.fetch(held, ["others"], output)
