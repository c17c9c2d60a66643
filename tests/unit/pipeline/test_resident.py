"""Tensors that wait on a rank between virtual stages: gradients, release, and every way to get them wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sla_megatron.pipeline.resident import ResidentTensors

NAMES = ("key", "value")


class TwoStages:
    """A keeper and a reader on one rank, each with its own graph, as a schedule runs them.

    The keeper makes K/V from its input and goes on to ``out``; the reader mixes what is resident into its own input.
    """

    def __init__(self, resident: ResidentTensors, microbatch: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.keeper_input = torch.randn(3, requires_grad=True)
        self.reader_input = torch.randn(3, requires_grad=True)
        self.resident, self.microbatch = resident, microbatch

    def key_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x * x

    def keep(self) -> None:
        # The key is also read by its own layer, as where it serves a standard head too.
        key, value = self.key_and_value(self.keeper_input)
        hidden = self.keeper_input.exp() + key.sin()
        self.kept = self.resident.keep(NAMES, (1, 1), self.microbatch, (key, value), hidden)

    def read(self) -> None:
        key, value = self.resident.fetch(NAMES, self.microbatch, self.reader_input)
        self.out = (self.reader_input * key + value).cos()

    def expected(self, keeper_gradient: Tensor, reader_gradient: Tensor) -> tuple[Tensor, ...]:
        """Gradients of both inputs, from one graph."""
        inputs = [x.detach().clone().requires_grad_() for x in (self.keeper_input, self.reader_input)]
        key, value = self.key_and_value(inputs[0])
        outputs = [inputs[0].exp() + key.sin(), (inputs[1] * key + value).cos()]
        return torch.autograd.grad(outputs, inputs, [keeper_gradient, reader_gradient])


def test_gradients_join_over_two_graphs() -> None:
    """Two backward calls, the reader's first, give what one graph gives: no graph is run twice, none retained."""
    resident = ResidentTensors()
    # Several microbatches are on their way at once; each finds its own.
    passes = [TwoStages(resident, microbatch, seed=microbatch) for microbatch in range(3)]
    for each in passes:
        each.keep()
    for each in passes:
        each.read()
    for each in passes:
        keeper_gradient, reader_gradient = torch.randn(3), torch.randn(3)
        each.out.backward(reader_gradient)
        each.kept.backward(keeper_gradient)
        expected = each.expected(keeper_gradient, reader_gradient)
        torch.testing.assert_close(each.keeper_input.grad, expected[0])
        torch.testing.assert_close(each.reader_input.grad, expected[1])
    resident.require_released(forward_only=False)
    assert resident.tensors() == []


def test_repeats_bit_for_bit() -> None:
    """The gradients of the same passes are equal to the last bit."""
    found = []
    for _ in range(2):
        each = TwoStages(ResidentTensors(), 0, seed=5)
        each.keep()
        each.read()
        each.out.sum().backward()
        each.kept.sum().backward()
        found.append(each.keeper_input.grad)
    assert torch.equal(*found)


def test_memory_is_freed_at_each_handing_over() -> None:
    """K/V once the reader has used them, though its graph lives; gradients once the keeper has them."""
    resident = ResidentTensors()
    x = torch.randn(3, requires_grad=True)
    key, value = x * 2, x * 3
    memory = StorageWeakRef(key.untyped_storage())
    hidden = resident.keep(NAMES, (1, 1), 0, (key, value), x + 1)
    del key, value
    assert not memory.expired()
    fetched = resident.fetch(NAMES, 0, x)
    out = torch.cat(fetched)
    del fetched
    assert memory.expired()
    out.sum().backward()
    gradients = [StorageWeakRef(tensor.untyped_storage()) for tensor in resident.tensors()]
    assert len(gradients) == 2
    hidden.sum().backward()
    assert all(gradient.expired() for gradient in gradients)
    assert torch.equal(x.grad, torch.full((3,), 6.0))


def test_a_lost_deposit_raises() -> None:
    """The keeper's backward does not run on without the reader's gradients, which would be silently wrong."""
    each = TwoStages(ResidentTensors(), 4, seed=0)
    each.keep()
    each.read()
    with pytest.raises(RuntimeError, match="key, microbatch 4: fetched, cannot be collected"):
        each.kept.sum().backward()


def test_k_v_that_were_never_read_raise() -> None:
    """At the end of the step, and in the keeper's backward."""
    resident = ResidentTensors()
    each = TwoStages(resident, 0, seed=0)
    each.keep()
    for forward_only in (False, True):
        with pytest.raises(RuntimeError, match="2 of 2 resident tensors were not"):
            resident.require_released(forward_only)
    with pytest.raises(RuntimeError, match="kept, cannot be collected"):
        each.kept.sum().backward()


def test_a_gradient_that_nobody_collected_raises() -> None:
    """The keeper's backward did not run."""
    resident = ResidentTensors()
    each = TwoStages(resident, 0, seed=0)
    each.keep()
    each.read()
    each.out.sum().backward()
    with pytest.raises(RuntimeError, match="not collected by the end of the step.*given a gradient"):
        resident.require_released(forward_only=False)


def test_each_is_kept_and_read_once() -> None:
    """Twice raises, as does what was never kept."""
    resident = ResidentTensors()
    each = TwoStages(resident, 0, seed=0)
    with pytest.raises(RuntimeError, match="key, microbatch 0: a stage needs it, which this rank does not hold"):
        each.read()
    each.keep()
    with pytest.raises(RuntimeError, match="kept twice"):
        each.keep()
    each.read()
    with pytest.raises(RuntimeError, match="fetched, cannot be fetched"):
        each.read()


def test_a_forward_only_pass_releases() -> None:
    """Nothing is left once it was read, and nothing is expected of a backward pass."""
    resident = ResidentTensors()
    with torch.no_grad():
        each = TwoStages(resident, 0, seed=0)
        each.keep()
        assert len(resident.tensors()) == 2
        each.read()
    assert resident.tensors() == []
    resident.require_released(forward_only=True)


def three_readers(resident: ResidentTensors, seed: int) -> tuple[Tensor, ...]:
    """A tensor that a keeper makes and uses itself, and three later stages read: the input's gradient, and one graph's.

    Backward as a schedule runs it: the last reader's first, the keeper's at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    x, *inputs = (torch.randn(5, generator=generator, requires_grad=True) for _ in range(4))
    gradients = [torch.randn(5, generator=generator) for _ in range(4)]

    def reader(i: int, own: Tensor, value: Tensor) -> Tensor:
        return (own * value * (i + 1)).tanh()

    value = x.sin()
    kept = resident.keep(["v"], [3], 0, [value], value * x)
    outputs = []
    for i, own in enumerate(inputs):
        (read,) = resident.fetch(["v"], 0, own)
        assert len(resident.tensors()) == (i < 2)
        outputs.append(reader(i, own, read))
    for i, (output, gradient) in enumerate(list(zip(outputs, gradients[1:], strict=True))[::-1]):
        output.backward(gradient)
        assert len(resident.tensors()) == 1, f"one sum after {i + 1} readers"
    assert x.grad is None
    kept.backward(gradients[0])
    resident.require_released(forward_only=False)
    assert not resident.tensors()

    y = x.detach().clone().requires_grad_()
    value = y.sin()
    of_one_graph = [value * y, *(reader(i, own.detach(), value) for i, own in enumerate(inputs))]
    torch.autograd.backward(of_one_graph, gradients)
    return x.grad, y.grad


def test_gradients_of_several_readers_are_added() -> None:
    """Readers in three stages and the keeper's own use: the sum of one graph, bit for bit the same each time."""
    found, expected = three_readers(ResidentTensors(), seed=3)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, three_readers(ResidentTensors(), seed=3)[0])


def test_what_readers_leave_is_nobody_else_s() -> None:
    """The sum is made in memory of its own: a gradient that others hold too stays what it was."""
    resident = ResidentTensors()
    x = torch.randn(3, requires_grad=True)
    kept = resident.keep(["v"], [2], 0, [x * 2], x + 1)
    outputs = []
    for _ in range(2):
        own = torch.zeros(3, requires_grad=True)
        outputs.append(resident.fetch(["v"], 0, own)[0] + own)
    gradient = torch.ones(3)
    outputs[1].backward(gradient)
    outputs[0].backward(gradient)
    assert torch.equal(gradient, torch.ones(3))
    kept.backward(torch.zeros(3))
    assert torch.equal(x.grad, torch.full((3,), 4.0))


def test_a_missing_reader_of_several_raises() -> None:
    """In the keeper's backward, at the end of a step, and for a third of two, forward and back."""
    resident = ResidentTensors()
    x = torch.randn(3, requires_grad=True)
    kept = resident.keep(["v"], [2], 7, [x * 2], x + 1)
    resident.fetch(["v"], 7, x)
    with pytest.raises(RuntimeError, match="v, microbatch 7: kept"):
        resident.require_released(forward_only=True)
    (second,) = resident.fetch(["v"], 7, x)
    resident.require_released(forward_only=True)
    with pytest.raises(RuntimeError, match="fetched, cannot be fetched"):
        resident.fetch(["v"], 7, x)
    second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="v, microbatch 7: fetched, cannot be collected"):
        kept.sum().backward(retain_graph=True)
    second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="v, microbatch 7: given a gradient, cannot be given a gradient"):
        second.sum().backward()
    kept.sum().backward()
