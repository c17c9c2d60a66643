"""Where tensors that cross layers live: handed out as often as declared, never made up, and forgotten."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from sla_megatron.pipeline.joining import joined
from sla_megatron.pipeline.waiting import Microbatch, current, hand_over, microbatch, receive


def pieces(value: float = 0.0) -> tuple[Tensor, ...]:
    """One piece, distinguishable from others."""
    return (torch.full((2, 1, 1, 4), value),)


def test_take_gives_what_was_put() -> None:
    """The very tensors, by name, whatever the order."""
    first, second = pieces(1), pieces(2)
    held = Microbatch()
    held.put((1, 9), first)
    held.put((1, 3), second)
    assert held.take((1, 3)) is second
    assert held.take((1, 9)) is first
    held.require_empty()


def test_a_tensor_that_is_missing_raises_and_is_named() -> None:
    """And what there is instead: never a fall-back."""
    held = Microbatch()
    held.put("second", pieces())
    with pytest.raises(RuntimeError, match="first: a layer needs it.*does not hold; it holds second"):
        held.take("first")


def test_taking_more_often_than_declared_raises() -> None:
    """Once where nothing else is said."""
    held = Microbatch({"twice": 2})
    held.put("twice", pieces(1))
    assert held.take("twice") is held.take("twice")
    with pytest.raises(RuntimeError, match="twice: a layer needs it.*holds nothing"):
        held.take("twice")
    once = Microbatch()
    once.put("once", pieces())
    once.take("once")
    with pytest.raises(RuntimeError, match="once: a layer needs it"):
        once.take("once")


def test_several_uses_can_be_taken_at_once() -> None:
    """As a chunk of layers does that is recomputed; more than are left raise and take nothing."""
    held = Microbatch({"v": 3})
    held.put("v", pieces())
    held.take("v", 2)
    with pytest.raises(RuntimeError, match="v: a layer needs it"):
        held.take("v", 2)
    held.take("v")
    held.require_empty()
    # What such a chunk leaves has fewer uses left than it was declared for.
    held.put("v", pieces(), uses=1)
    held.take("v")
    held.require_empty()


def test_what_is_not_declared_cannot_be_handed_over() -> None:
    with pytest.raises(RuntimeError, match="v2: handed over, but not declared"):
        Microbatch({"v": 3}).put("v2", pieces())


def test_putting_twice_raises_and_keeps_the_first() -> None:
    """A second hand-over of a tensor that still waits is a mistake, and does not replace it."""
    first = pieces(1)
    held = Microbatch()
    held.put((3, 2), first)
    with pytest.raises(RuntimeError, match=r"\(3, 2\): handed over twice"):
        held.put((3, 2), pieces(2))
    assert held.take((3, 2)) is first


def test_tensors_in_pieces_are_put_together() -> None:
    """In order of the pieces; what is whole already is not copied; tensors need not be alike."""
    several = [torch.randn(2, 1, size, 4) for size in (1, 2, 1)]
    others = [torch.randn(3, 2, 2, 5)]
    found, other = joined([several, others])
    assert torch.equal(found, torch.cat(several, dim=2)) and torch.equal(other, others[0])
    assert joined([[found], [other]]) == (found, other)


def test_gradients_come_back_to_the_pieces() -> None:
    """Of tensors of two shapes, one of which nobody used."""
    several = [torch.randn(2, 1, size, 4, requires_grad=True) for size in (1, 2)]
    unused = [torch.randn(2, 1, size, 3, requires_grad=True) for size in (1, 1)]
    whole, _ = joined([several, unused])
    gradient = torch.randn(whole.shape)
    whole.backward(gradient)
    assert torch.equal(torch.cat([piece.grad for piece in several], dim=2), gradient)
    assert [piece.grad for piece in unused] == [None, None]


def test_a_whole_tensor_is_no_view_of_a_projection() -> None:
    """One that is kept for long must not keep the rest of the projection alive."""
    projection = torch.randn(2, 3, 4, 8)
    for part in joined([[projection[:, :, 1:3, :4]], [projection[:, :, 1:3, 4:]]]):
        assert part.untyped_storage().nbytes() == part.numel() * 4


def test_a_tensor_without_its_readers_raises_on_leaving() -> None:
    """The end of a microbatch says which tensors are left, and for how many."""
    with pytest.raises(RuntimeError, match=r"no reader.*v \(2 times\)"), microbatch({"v": 3}) as held:
        held.put("v", pieces())
        held.take("v")


def test_layers_hand_over_and_receive() -> None:
    """By name, in whichever microbatch is running; the tensor itself, or its pieces put together."""
    (tensor,) = pieces(3)
    with microbatch({"v": 2}):
        hand_over("v", tensor)
        assert receive("v") is tensor and receive("v") is tensor
    with microbatch() as held:
        held.put("v", [tensor, tensor + 1])
        assert torch.equal(receive("v"), torch.cat([tensor, tensor + 1], dim=2))
    with pytest.raises(RuntimeError, match="outside"):
        hand_over("v", tensor)


def test_outside_of_a_microbatch_there_is_none() -> None:
    """Outside, ``current`` raises and says how to build the model; inside, it is the one that was opened."""
    with pytest.raises(RuntimeError, match="outside of a block that carries them.*sla_transformer_blocks"):
        current()
    with microbatch() as held:
        assert current() is held
    with pytest.raises(RuntimeError, match="outside"):
        current()


def test_nesting_restores_the_outer_one() -> None:
    """An inner microbatch sees nothing of the outer one, and leaves it as it was."""
    with microbatch() as outer:
        outer.put((1, 2), pieces())
        with microbatch() as inner:
            assert current() is inner
            with pytest.raises(RuntimeError, match="needs"):
                inner.take((1, 2))
        assert current() is outer
        outer.take((1, 2))


def test_an_error_inside_comes_through_and_ends_the_microbatch() -> None:
    """The error is the original, not a complaint about what waits; the outer one is current again."""
    with microbatch() as outer:
        with pytest.raises(ZeroDivisionError), microbatch() as inner:
            inner.put((1, 2), pieces())
            raise ZeroDivisionError
        assert current() is outer
    with pytest.raises(RuntimeError, match="outside"):
        current()


def test_a_leftover_also_ends_the_microbatch() -> None:
    """After the complaint about a tensor without a reader, no microbatch is open."""
    with pytest.raises(RuntimeError, match="no reader"), microbatch() as held:
        held.put((1, 2), pieces())
    with pytest.raises(RuntimeError, match="outside"):
        current()


def test_nothing_is_kept_after_the_last_take() -> None:
    """Once its readers dropped it, a tensor is gone, though the microbatch goes on."""
    with microbatch({"v": 2}) as held:
        tensors = pieces()
        seen = weakref.ref(tensors[0])
        held.put("v", tensors)
        del tensors
        held.take("v")
        gc.collect()
        assert seen() is not None
        held.take("v")
        gc.collect()
        assert seen() is None
