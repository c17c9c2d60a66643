"""Hidden states and K/V as the one tensor that a schedule sends, and back.

The payload has the shape ``[s, b, h + w]``, as though K/V widened the feature dimension, so that whoever reads the
sequence length or the microbatch size off it (rotary embedding does) reads the right one.  In memory the pieces lie one
after the other, each whole: hidden states, then key and value of each bundle.  With sequence parallelism hidden states
are ``[s/T, b, h]`` and K/V still ``[s, b, groups, d]``; only the width differs.

Packing is one copy, straight from where the K/V lie, and unpacking is one; so are their gradients' ways: what comes
back to a stage is read where it lies, and what a stage sends back is written once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention import mixing_kernel
from ..attention.microbatch_kv import Bundle
from ..attention.mixing import move
from ..attention.mixing_plan import Run
from ..attention.roles import BundleName
from .payload import MicrobatchShape

#: Key and value of one bundle, each whole, [s, b, groups, d].
KeyAndValue = tuple[Tensor, Tensor]


def pack(hidden_states: Tensor, bundles: Sequence[Bundle], shape: MicrobatchShape) -> Tensor:
    """The payload ``[s, b, h + w]``, a tensor that is no view: ``--deallocate-pipeline-outputs`` frees it once sent.

    Raises ``RuntimeError`` where a piece has not the shape that the receiver allocates for.
    """
    _require_shape("hidden states", hidden_states, shape.hidden_shape)
    sides = [side for bundle in bundles for side in (bundle.keys, bundle.values)]
    for piece in chain.from_iterable(sides):
        _require_shape("keys or values", piece, shape.kv_shape(piece.shape[2]))
    groups = tuple(tuple(piece.shape[2] for piece in side) for side in sides)
    return _Pack.apply(shape, groups, hidden_states, *chain(*sides))


class _Pack(torch.autograd.Function):
    """Pieces to their places in a payload; ``groups`` says how many each piece has, of each key and value."""

    @staticmethod
    def forward(
        ctx: Any, shape: MicrobatchShape, groups: tuple[tuple[int, ...], ...], hidden_states: Tensor, *pieces: Tensor
    ) -> Tensor:
        ctx.shape, ctx.groups = shape, groups
        payload = hidden_states.new_empty(shape.payload_shape(sum(map(sum, groups)) // 2))
        _move(_parts(payload, map(sum, groups), shape), [hidden_states.unsqueeze(2), *pieces], _gathering(groups))
        return payload

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, *wholes = _parts(gradient.contiguous(), map(sum, ctx.groups), ctx.shape)
        pieces = [whole.split(sizes, dim=2) for whole, sizes in zip(wholes, ctx.groups, strict=True)]
        return None, None, hidden_states.squeeze(2), *chain(*pieces)


def unpack_and_empty(
    payload: Tensor, num_groups: Mapping[BundleName, int], copied: Collection[BundleName], shape: MicrobatchShape
) -> tuple[Tensor, dict[BundleName, KeyAndValue]]:
    """Hidden states ``[s, b, h]`` and the bundles of a payload; the payload itself is left without its data.

    Autograd, and the schedule until the backward pass, hold on to the tensor that arrived.  It is therefore emptied,
    and hidden states are copied out, so that K/V that this stage only reads once or sends on are freed with its
    forward pass.

    Args:
        payload: ``[s, b, h + w]`` as received.  Its data is gone afterwards; shape, gradient and graph stay.
        num_groups: the bundles in it, in order, and each one's K/V groups.
        copied: the bundles that outlive the forward pass, which get memory of their own.
        shape: the sizes of the microbatch.
    """
    _require_shape("the payload", payload, shape.payload_shape(sum(num_groups.values())))
    groups = tuple(size for size in num_groups.values() for _ in ("key", "value"))
    copies = tuple(name in copied for name in num_groups for _ in ("key", "value"))
    hidden_states, *tensors = _Unpack.apply(shape, groups, copies, payload)
    bundles = dict(zip(num_groups, zip(tensors[0::2], tensors[1::2], strict=True), strict=True))
    # Every element is the same one: the shape stays true, and autograd takes the gradient as it comes.
    payload.data = payload.new_empty(1).expand(payload.shape)
    return hidden_states, bundles


class _Unpack(torch.autograd.Function):
    """Hidden states, then each key and value of ``groups`` groups; those of ``copies`` in memory of their own."""

    @staticmethod
    def forward(
        ctx: Any, shape: MicrobatchShape, groups: tuple[int, ...], copies: tuple[bool, ...], payload: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.shape, ctx.groups = shape, groups
        ctx.set_materialize_grads(False)
        parts = _parts(payload, groups, shape)
        hidden_states = payload.new_empty(shape.hidden_shape)
        outputs = [
            part.new_empty(part.shape) if is_copy else part for part, is_copy in zip(parts[1:], copies, strict=True)
        ]
        _move([hidden_states.unsqueeze(2), *outputs], parts, _one_to_one(groups, copies))
        return hidden_states, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_hidden: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        some = next(gradient for gradient in (of_hidden, *gradients) if gradient is not None)
        whole = some.new_empty(ctx.shape.payload_shape(sum(ctx.groups) // 2))
        sources = [None if of_hidden is None else of_hidden.unsqueeze(2), *gradients]
        _move(_parts(whole, ctx.groups, ctx.shape), sources, _one_to_one(ctx.groups))
        return None, None, None, whole


def _move(targets: Sequence[Tensor], sources: Sequence[Tensor | None], runs: tuple[Run, ...]) -> None:
    """All at once; but a kernel's heads are of one shape, and hidden states, the first tensor, have another."""
    if mixing_kernel.serves(targets[0]):
        move(targets, sources, _of_hidden)
        move(targets, sources, runs)
    else:
        move(targets, sources, (*_of_hidden, *runs))


_of_hidden = (Run(0, 0, 1, 0, 0, 1, 1),)


@lru_cache
def _gathering(groups: tuple[tuple[int, ...], ...]) -> tuple[Run, ...]:
    """From pieces to where they belong in each key and value; ``groups`` says how many each piece has."""
    runs: list[Run] = []
    for whole, sizes in enumerate(groups, start=1):
        for i, size in enumerate(sizes):
            runs.append(Run(len(runs) + 1, 0, 1, whole, sum(sizes[:i]), 1, size))
    return tuple(runs)


@lru_cache
def _one_to_one(groups: tuple[int, ...], chosen: tuple[bool, ...] | None = None) -> tuple[Run, ...]:
    """Each key and value, or those that are chosen, to one of the same size."""
    numbers = [i for i in range(len(groups)) if chosen is None or chosen[i]]
    return tuple(Run(i + 1, 0, 1, i + 1, 0, 1, groups[i]) for i in numbers)


def _parts(payload: Tensor, groups: Iterable[int], shape: MicrobatchShape) -> list[Tensor]:
    """Views of a contiguous payload: hidden states ``[s, b, 1, h]``, then keys and values ``[s, b, groups, d]``."""
    s, b, h = shape.hidden_shape
    shapes = [(s, b, 1, h), *map(shape.kv_shape, groups)]
    sizes = [shape.hidden_elements, *(shape.kv_elements(each[2]) // 2 for each in shapes[1:])]
    return [piece.view(each) for piece, each in zip(payload.view(-1).split(sizes), shapes, strict=True)]


def _require_shape(what: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise RuntimeError(
            f"{what} between pipeline stages: shape {tuple(tensor.shape)}, expected {expected} from --seq-length, "
            "--micro-batch-size and the model; batches of other sizes are not supported with --sla"
        )
