"""Where shared K/V live: handed out once, never made up, and forgotten."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sla_megatron.attention.microbatch_kv import Bundle, MicrobatchKV, current, microbatch


def bundle(value: float = 0.0) -> Bundle:
    """A key and a value of one group, distinguishable from others and from each other."""
    return Bundle([torch.full((2, 1, 1, 4), value)], [torch.full((2, 1, 1, 4), -value)])


def test_take_gives_what_was_put() -> None:
    """The very tensors, by the bundle's name, whatever the order."""
    first, second = bundle(1), bundle(2)
    kv = MicrobatchKV()
    kv.put((1, 9), first)
    kv.put((1, 3), second)
    assert kv.take((1, 3)) is second
    assert kv.take((1, 9)) is first
    kv.require_empty()


def test_a_missing_source_raises_and_names_both_layers() -> None:
    """The reader, the source, the distance and what there is instead: never a fall-back."""
    kv = MicrobatchKV({(2, 9): bundle()})
    with pytest.raises(RuntimeError, match=r"layer 10 needs .*K/V of layer 1 \(distance 9\).*holds \[\(2, 9\)\]"):
        kv.take((1, 9))


def test_taking_twice_raises() -> None:
    """A bundle has one reader."""
    kv = MicrobatchKV({(1, 9): bundle()})
    kv.take((1, 9))
    with pytest.raises(RuntimeError, match="layer 10 needs .*layer 1"):
        kv.take((1, 9))


def test_putting_twice_raises_and_keeps_the_first() -> None:
    """A second hand-over of a bundle that still waits is a mistake, and does not replace it."""
    first = bundle(1)
    kv = MicrobatchKV({(3, 2): first})
    with pytest.raises(RuntimeError, match="layer 3, distance 2 .*twice"):
        kv.put((3, 2), bundle(2))
    assert kv.take((3, 2)) is first


def test_a_bundle_in_pieces_is_put_together() -> None:
    """In the order of the groups; what is whole already is not copied."""
    keys = [torch.randn(2, 1, size, 4) for size in (1, 2, 1)]
    values = [-piece for piece in keys]
    key, value = Bundle(keys, values).joined()
    assert torch.equal(key, torch.cat(keys, dim=2)) and torch.equal(value, -key)
    assert Bundle([key], [value]).joined() == (key, value)


def test_a_whole_bundle_is_no_view_of_a_projection() -> None:
    """One that is kept for long must not keep the rest of the projection alive."""
    projection = torch.randn(2, 3, 4, 8)
    for part in Bundle([projection[:, :, 1:3, :4]], [projection[:, :, 1:3, 4:]]).joined():
        assert part.untyped_storage().nbytes() == part.numel() * 4


def test_a_bundle_that_found_no_reader_raises_on_leaving() -> None:
    """The end of a microbatch says which bundles are left."""
    with pytest.raises(RuntimeError, match=r"no reader.*\(4, 2\)"), microbatch() as kv:
        kv.put((4, 2), bundle())


def test_bundles_can_wait_from_the_start() -> None:
    """A microbatch may begin with bundles, and they too must find their reader."""
    waiting = {(1, 9): bundle()}
    with microbatch(waiting) as kv:
        assert kv.take((1, 9)) is waiting[1, 9]
    with pytest.raises(RuntimeError, match="no reader"), microbatch(waiting):
        pass


def test_outside_of_a_microbatch_there_is_none() -> None:
    """Outside, ``current`` raises and says how to build the model; inside, it is the one that was opened."""
    with pytest.raises(RuntimeError, match="outside of an SLATransformerBlock.*sla_transformer_blocks"):
        current()
    with microbatch() as kv:
        assert current() is kv
    with pytest.raises(RuntimeError, match="outside"):
        current()


def test_nesting_restores_the_outer_one() -> None:
    """An inner microbatch sees nothing of the outer one, and leaves it as it was."""
    with microbatch() as outer:
        outer.put((1, 2), bundle())
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
            inner.put((1, 2), bundle())
            raise ZeroDivisionError
        assert current() is outer
    with pytest.raises(RuntimeError, match="outside"):
        current()


def test_a_leftover_also_ends_the_microbatch() -> None:
    """After the complaint about a bundle without a reader, no microbatch is open."""
    with pytest.raises(RuntimeError, match="no reader"), microbatch() as kv:
        kv.put((1, 2), bundle())
    with pytest.raises(RuntimeError, match="outside"):
        current()


def test_nothing_is_kept_after_take() -> None:
    """Once its reader dropped it, a bundle is gone, though the microbatch goes on."""
    with microbatch() as kv:
        tensors = bundle()
        seen = [weakref.ref(tensor) for tensor in (*tensors.keys, *tensors.values)]
        kv.put((1, 2), tensors)
        del tensors
        gc.collect()
        assert all(ref() is not None for ref in seen)
        kv.take((1, 2))
        gc.collect()
        assert [ref() for ref in seen] == [None, None]


def test_what_waited_at_the_start_is_not_kept_either() -> None:
    """The mapping a microbatch begins with is copied: taking from it leaves the caller's as it was."""
    waiting = {(1, 2): bundle()}
    seen = weakref.ref(waiting[1, 2].keys[0])
    with microbatch(waiting) as kv:
        kv.take((1, 2))
        assert list(waiting) == [(1, 2)]
        waiting.clear()
        gc.collect()
        assert seen() is None
