"""Payloads: shape and memory order, gradients through packing and unpacking, and what they let go of."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sla_megatron.pipeline.declarations import CrossLayerTensor
from sla_megatron.pipeline.payload import Columns, MicrobatchShape

SHAPES = [
    MicrobatchShape(8, 2, 6),
    MicrobatchShape(8, 1, 4, tensor_parallel_size=2, sequence_parallel=True),
    MicrobatchShape(8, 3, 4, tensor_parallel_size=2, context_parallel_size=2, sequence_parallel=True),
]

#: Of one unit and of others, one of which is split as hidden states are.
TENSORS = (
    CrossLayerTensor("key", 1, (4,), (1,), 3),
    CrossLayerTensor("value", 1, (4,), (2,), 3),
    CrossLayerTensor("wide", 2, (5, 6), (3,), 2),
    CrossLayerTensor("split", 2, (5, 6), (1,), 4, follows_hidden=True),
)


@pytest.fixture
def packing(megatron_imported: None) -> ModuleType:
    """The module, once Megatron can be imported."""
    from sla_megatron.pipeline import packing

    return packing


def parts(
    shape: MicrobatchShape, tensors: tuple[CrossLayerTensor, ...] = TENSORS, device: str = "cpu"
) -> tuple[Tensor, list[Tensor]]:
    """Random hidden states and ``tensors``, all requiring gradients."""
    shapes = [shape.hidden_shape, *(shape.tensor_shape(each, 0) for each in tensors)]
    hidden, *wholes = (torch.randn(each, requires_grad=True, device=device) for each in shapes)
    return hidden, wholes


def in_pieces(wholes: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """Each in one piece, or one for each step of its width."""
    return [tuple(whole.split(1, dim=2)) if i % 2 else (whole,) for i, whole in enumerate(wholes)]


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_and_memory_of_a_payload(packing: ModuleType, shape: MicrobatchShape) -> None:
    """Tensors widen the feature dimension; in memory the pieces lie whole, one after the other; nothing is added."""
    hidden, wholes = parts(shape)
    payload = packing.pack(hidden, in_pieces(wholes), TENSORS, shape)
    assert payload.shape[:2] == hidden.shape[:2]
    assert payload.numel() == sum(piece.numel() for piece in (hidden, *wholes))
    assert torch.equal(payload.flatten(), torch.cat([piece.flatten() for piece in (hidden, *wholes)]))


COPIED = [(False,) * 4, (True,) * 4, (False, True, True, False)]


def there_and_back(packing: ModuleType, shape: MicrobatchShape, copied: tuple[bool, ...], device: str = "cpu") -> None:
    """What is unpacked is what was packed, and each piece's gradient comes back to it."""
    hidden, wholes = parts(shape, device=device)
    sent = packing.pack(hidden, in_pieces(wholes), TENSORS, shape)
    received = sent.detach().clone().requires_grad_()
    arrived_hidden, arrived = packing.unpack_and_empty(received, TENSORS, copied, shape)
    assert torch.equal(arrived_hidden, hidden)
    assert all(map(torch.equal, arrived, wholes))
    outputs = [arrived_hidden, *arrived]
    gradients = [torch.randn_like(output) for output in outputs]
    torch.autograd.backward(outputs, gradients)
    assert received.grad.shape == sent.shape
    sent.backward(received.grad)
    for tensor, gradient in zip([hidden, *wholes], gradients, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("copied", COPIED)
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(packing: ModuleType, shape: MicrobatchShape, copied: tuple[bool, ...]) -> None:
    there_and_back(packing, shape, copied)


def test_what_is_read_and_sent_on_gets_both_gradients(packing: ModuleType) -> None:
    """A tensor arrives, a layer reads it, and it leaves again: one payload in, one out, and the sum goes back."""
    shape, tensors = SHAPES[0], TENSORS[:1]
    hidden, (value,) = parts(shape, tensors)
    received = packing.pack(hidden, [(value,)], tensors, shape).detach().requires_grad_()
    arrived_hidden, (arrived,) = packing.unpack_and_empty(received, tensors, (False,), shape)
    read = arrived_hidden + arrived.sum()
    sent = packing.pack(read, [(arrived,)], tensors, shape)
    gradient = torch.randn(sent.shape)
    sent.backward(gradient)
    of_hidden, of_value = gradient.flatten().split([hidden.numel(), value.numel()])
    back = received.grad.flatten()[hidden.numel() :]
    torch.testing.assert_close(back, of_value + of_hidden.sum())


def test_a_piece_that_nobody_used_gets_zeros(packing: ModuleType) -> None:
    """The gradient payload is always whole."""
    shape = SHAPES[0]
    hidden, wholes = parts(shape)
    received = packing.pack(hidden, in_pieces(wholes), TENSORS, shape).detach().requires_grad_()
    arrived, _ = packing.unpack_and_empty(received, TENSORS, (False,) * 4, shape)
    arrived.sum().backward()
    others = shape.elements(Columns.of(TENSORS, 0))
    expected = torch.cat([torch.ones(shape.hidden_elements), torch.zeros(others)])
    assert torch.equal(received.grad.flatten(), expected)


def test_a_payload_can_be_freed_once_sent(packing: ModuleType) -> None:
    """It is no view, which Megatron's deallocation asserts, and backward works without its data."""
    from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

    shape = SHAPES[0]
    hidden, wholes = parts(shape)
    payload = packing.pack(hidden, in_pieces(wholes), TENSORS, shape)
    memory, gradient = StorageWeakRef(payload.untyped_storage()), torch.randn(payload.shape)
    deallocate_output_tensor(payload, True)
    assert memory.expired()
    custom_backward(payload, gradient)
    assert torch.equal(hidden.grad.flatten(), gradient.flatten()[: hidden.numel()])


def test_an_unpacked_payload_lets_go_of_its_memory(packing: ModuleType) -> None:
    """With the tensors that were only read or sent on, it is freed; hidden states and copies outlive it."""
    shape, tensors = SHAPES[0], TENSORS[:2]
    hidden, wholes = parts(shape, tensors)
    payload = packing.pack(hidden, in_pieces(wholes), tensors, shape).detach().requires_grad_()
    memory = StorageWeakRef(payload.untyped_storage())
    arrived_hidden, (read, copied) = packing.unpack_and_empty(payload, tensors, (False, True), shape)
    assert not memory.expired()
    del read
    assert memory.expired()
    assert torch.equal(arrived_hidden, hidden)
    assert torch.equal(copied, wholes[1])


def test_other_shapes_raise_with_both(packing: ModuleType) -> None:
    """A batch of another length or size is found before it is sent, and on arrival."""
    shape, tensors = SHAPES[0], TENSORS[:2]
    hidden, (key, value) = parts(shape, tensors)
    with pytest.raises(RuntimeError, match=r"hidden states.*\(7, 2, 6\), expected \(8, 2, 6\)"):
        packing.pack(hidden[1:], [], (), shape)
    with pytest.raises(RuntimeError, match=r"value between.*\(7, 2, 2, 3\), expected \(8, 2, 2, 3\)"):
        packing.pack(hidden, [(key,), (value[1:],)], tensors, shape)
    with pytest.raises(RuntimeError, match=r"value between.*\(8, 2, 1, 3\), expected \(8, 2, 2, 3\)"):
        packing.pack(hidden, [(key,), (key,)], tensors, shape)
    with pytest.raises(RuntimeError, match=r"payload.*\(8, 2, 6\), expected \(8, 2, 15\)"):
        packing.unpack_and_empty(hidden, tensors, (False, False), shape)
