"""Payloads: shape and memory order, gradients through packing and unpacking, and what they let go of."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sla_megatron.attention.microbatch_kv import Bundle
from sla_megatron.pipeline.payload import MicrobatchShape

SHAPES = [
    MicrobatchShape(8, 2, 6, 3),
    MicrobatchShape(8, 1, 4, 2, tensor_parallel_size=2, sequence_parallel=True),
    MicrobatchShape(8, 3, 4, 2, tensor_parallel_size=2, context_parallel_size=2, sequence_parallel=True),
]


@pytest.fixture
def packing(megatron_imported: None) -> ModuleType:
    """The module, once Megatron can be imported."""
    from sla_megatron.pipeline import packing

    return packing


def parts(shape: MicrobatchShape) -> tuple[Tensor, dict[tuple[int, int], tuple[Tensor, Tensor]]]:
    """Random hidden states and two bundles, of one and of two groups, all requiring gradients."""
    hidden = torch.randn(shape.hidden_shape, requires_grad=True)
    bundles = {
        (layer, 3): tuple(torch.randn(shape.kv_shape(groups), requires_grad=True) for _ in range(2))
        for layer, groups in ((1, 1), (2, 2))
    }
    return hidden, bundles


def whole(*bundles: tuple[Tensor, Tensor]) -> list[Bundle]:
    return [Bundle([key], [value]) for key, value in bundles]


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_and_memory_of_a_payload(packing: ModuleType, shape: MicrobatchShape) -> None:
    """K/V widen the feature dimension; in memory the pieces lie whole, one after the other; nothing is added."""
    hidden, bundles = parts(shape)
    payload = packing.pack(hidden, whole(*bundles.values()), shape)
    assert payload.shape[:2] == hidden.shape[:2]
    pieces = [hidden, *(tensor for bundle in bundles.values() for tensor in bundle)]
    assert payload.numel() == sum(piece.numel() for piece in pieces)
    assert torch.equal(payload.flatten(), torch.cat([piece.flatten() for piece in pieces]))


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(packing: ModuleType, shape: MicrobatchShape) -> None:
    """What is unpacked is what was packed, and each piece's gradient comes back to it."""
    hidden, bundles = parts(shape)
    sent = packing.pack(hidden, whole(*bundles.values()), shape)
    received = sent.detach().clone().requires_grad_()
    arrived_hidden, arrived = packing.unpack_and_empty(received, {(1, 3): 1, (2, 3): 2}, [(2, 3)], shape)
    assert torch.equal(arrived_hidden, hidden)
    assert list(arrived) == list(bundles)
    for name, bundle in bundles.items():
        assert all(map(torch.equal, arrived[name], bundle))
    outputs = [arrived_hidden, *(tensor for bundle in arrived.values() for tensor in bundle)]
    inputs = [hidden, *(tensor for bundle in bundles.values() for tensor in bundle)]
    gradients = [torch.randn_like(output) for output in outputs]
    torch.autograd.backward(outputs, gradients)
    assert received.grad.shape == sent.shape
    sent.backward(received.grad)
    for tensor, gradient in zip(inputs, gradients, strict=True):
        assert torch.equal(tensor.grad, gradient)


def test_a_piece_that_nobody_used_gets_zeros(packing: ModuleType) -> None:
    """The gradient payload is always whole."""
    shape = SHAPES[0]
    hidden, bundles = parts(shape)
    received = packing.pack(hidden, whole(bundles[1, 3]), shape).detach().requires_grad_()
    arrived, _ = packing.unpack_and_empty(received, {(1, 3): 1}, [], shape)
    arrived.sum().backward()
    expected = torch.cat([torch.ones(shape.hidden_elements), torch.zeros(shape.kv_elements(1))])
    assert torch.equal(received.grad.flatten(), expected)


def test_a_payload_can_be_freed_once_sent(packing: ModuleType) -> None:
    """It is no view, which Megatron's deallocation asserts, and backward works without its data."""
    from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

    shape = SHAPES[0]
    hidden, bundles = parts(shape)
    payload = packing.pack(hidden, whole(*bundles.values()), shape)
    memory, gradient = StorageWeakRef(payload.untyped_storage()), torch.randn(payload.shape)
    deallocate_output_tensor(payload, True)
    assert memory.expired()
    custom_backward(payload, gradient)
    assert torch.equal(hidden.grad.flatten(), gradient.flatten()[: hidden.numel()])


def test_an_unpacked_payload_lets_go_of_its_memory(packing: ModuleType) -> None:
    """With the bundles that were only read or sent on, it is freed; hidden states and copies outlive it."""
    shape = SHAPES[0]
    hidden, bundles = parts(shape)
    payload = packing.pack(hidden, whole(*bundles.values()), shape).detach().requires_grad_()
    memory = StorageWeakRef(payload.untyped_storage())
    arrived_hidden, arrived = packing.unpack_and_empty(payload, {(1, 3): 1, (2, 3): 2}, [(2, 3)], shape)
    assert not memory.expired()
    del arrived[1, 3]
    assert memory.expired()
    assert torch.equal(arrived_hidden, hidden)
    assert torch.equal(arrived[2, 3][1], bundles[2, 3][1])


def test_other_shapes_raise_with_both(packing: ModuleType) -> None:
    """A batch of another length or size is found before it is sent, and on arrival."""
    shape = SHAPES[0]
    hidden, bundles = parts(shape)
    with pytest.raises(RuntimeError, match=r"hidden states.*\(7, 2, 6\), expected \(8, 2, 6\)"):
        packing.pack(hidden[1:], [], shape)
    short = [(bundles[1, 3][0], bundles[1, 3][1][1:])]
    with pytest.raises(RuntimeError, match=r"keys or values.*\(7, 2, 1, 3\), expected \(8, 2, 1, 3\)"):
        packing.pack(hidden, whole(*short), shape)
    with pytest.raises(RuntimeError, match=r"payload.*\(8, 2, 6\), expected \(8, 2, 12\)"):
        packing.unpack_and_empty(hidden, {(1, 3): 1}, [], shape)
