"""Hidden states and tensors that cross layers as the one tensor that a schedule sends, and back.

The payload has the shape ``[s, b, h + w]``, as though the tensors widened the feature dimension, so that whoever reads
the sequence length or the microbatch size off it (rotary embedding does) reads the right one.  In memory the pieces lie
one after the other, each whole: hidden states, then each tensor.  With sequence parallelism hidden states are
``[s/T, b, h]`` and a tensor of all positions is still ``[s, b, width, unit]``; only the payload's width differs.

Packing is one copy, straight from where the pieces lie, and unpacking is one; so are their gradients' ways: what comes
back to a stage is read where it lies, and what a stage sends back is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import copy_kernel
from .copying import move, move_of_any_shape
from .declarations import CrossLayerTensor
from .joining import Widths, gathering
from .payload import Columns, MicrobatchShape
from .runs import Run

#: The shapes of a payload: itself, the hidden states ``[s, b, 1, h]`` in it and each tensor ``[s, b, width, unit]``.
Shapes = tuple[tuple[int, ...], ...]


@lru_cache
def _shapes(shape: MicrobatchShape, tensors: tuple[CrossLayerTensor, ...], tensor_parallel_rank: int) -> Shapes:
    s, b, h = shape.hidden_shape
    payload = shape.payload_shape(Columns.of(tensors, tensor_parallel_rank))
    return (payload, (s, b, 1, h), *(shape.tensor_shape(tensor, tensor_parallel_rank) for tensor in tensors))


def pack(
    hidden_states: Tensor,
    pieces: Sequence[Sequence[Tensor]],
    tensors: tuple[CrossLayerTensor, ...],
    shape: MicrobatchShape,
    tensor_parallel_rank: int = 0,
) -> Tensor:
    """The payload ``[s, b, h + w]``, a tensor that is no view: ``--deallocate-pipeline-outputs`` frees it once sent.

    Args:
        hidden_states: ``[s, b, h]``.
        pieces: of each tensor, along its width, ``[s, b, part of the width, unit]``.
        tensors: what these are, in order.
        shape: the sizes of the microbatch.
        tensor_parallel_rank: this rank.

    Raises ``RuntimeError`` where a tensor has not the shape that the receiver allocates for.
    """
    shapes = _shapes(shape, tensors, tensor_parallel_rank)
    _require_shape("hidden states", hidden_states, shape.hidden_shape)
    widths = tuple(tuple(piece.shape[2] for piece in its) for its in pieces)
    for tensor, its, sizes, (s, b, width, unit) in zip(tensors, pieces, widths, shapes[2:], strict=True):
        for piece in its:
            # Too wide or too narrow in all is the last piece's fault, as good as any.
            right = piece.shape[2] if sum(sizes) == width else width
            _require_shape(str(tensor.name), piece, (s, b, right, unit))
    return _Pack.apply(shapes, widths, hidden_states, *chain(*pieces))


class _Pack(torch.autograd.Function):
    """Pieces to their places in a payload of ``shapes``; ``widths`` are those of each tensor's pieces."""

    @staticmethod
    def forward(ctx: Any, shapes: Shapes, widths: Widths, hidden_states: Tensor, *pieces: Tensor) -> Tensor:
        ctx.shapes, ctx.widths = shapes, widths
        payload = hidden_states.new_empty(shapes[0])
        _move(_parts(payload, shapes), [hidden_states.unsqueeze(2), *pieces], _gathering(widths))
        return payload

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, *wholes = _parts(gradient.contiguous(), ctx.shapes)
        pieces = [whole.split(sizes, dim=2) for whole, sizes in zip(wholes, ctx.widths, strict=True)]
        return None, None, hidden_states.squeeze(2), *chain(*pieces)


def unpack_and_empty(
    payload: Tensor,
    tensors: tuple[CrossLayerTensor, ...],
    copied: tuple[bool, ...],
    shape: MicrobatchShape,
    tensor_parallel_rank: int = 0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Hidden states ``[s, b, h]`` and the tensors of a payload; the payload itself is left without its data.

    Autograd, and the schedule until the backward pass, hold on to the tensor that arrived.  It is therefore emptied,
    and hidden states are copied out, so that what this stage only reads once or sends on is freed with its forward
    pass.

    Args:
        payload: ``[s, b, h + w]`` as received.  Its data is gone afterwards; shape, gradient and graph stay.
        tensors: what is in it, in order.
        copied: of each, whether it outlives the forward pass and gets memory of its own.
        shape: the sizes of the microbatch.
        tensor_parallel_rank: this rank.
    """
    shapes = _shapes(shape, tensors, tensor_parallel_rank)
    _require_shape("the payload", payload, shapes[0])
    hidden_states, *arrived = _Unpack.apply(shapes, copied, payload)
    # Every element is the same one: the shape stays true, and autograd takes the gradient as it comes.
    payload.data = payload.new_empty(1).expand(payload.shape)
    return hidden_states, tuple(arrived)


class _Unpack(torch.autograd.Function):
    """Hidden states, then each tensor; those of ``copied`` in memory of their own."""

    @staticmethod
    def forward(ctx: Any, shapes: Shapes, copied: tuple[bool, ...], payload: Tensor) -> tuple[Tensor, ...]:
        ctx.shapes = shapes
        ctx.set_materialize_grads(False)
        parts = _parts(payload, shapes)
        s, b, _, h = shapes[1]
        hidden_states = payload.new_empty((s, b, h))
        outputs = [
            part.new_empty(part.shape) if is_copy else part for part, is_copy in zip(parts[1:], copied, strict=True)
        ]
        _move([hidden_states.unsqueeze(2), *outputs], parts, _one_to_one(shapes[2:], copied))
        return hidden_states, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_hidden: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        some = next(gradient for gradient in (of_hidden, *gradients) if gradient is not None)
        whole = some.new_empty(ctx.shapes[0])
        sources = [None if of_hidden is None else of_hidden.unsqueeze(2), *gradients]
        _move(_parts(whole, ctx.shapes), sources, _one_to_one(ctx.shapes[2:]))
        return None, None, whole


def _move(targets: Sequence[Tensor], sources: Sequence[Tensor | None], runs: tuple[Run, ...]) -> None:
    """All at once; but a kernel's heads are of one shape, and hidden states, the first tensor, have another."""
    if copy_kernel.serves(targets[0]):
        move(targets, sources, _of_hidden)
        move_of_any_shape(targets, sources, runs)
    else:
        move(targets, sources, (*_of_hidden, *runs))


_of_hidden = (Run(0, 0, 1, 0, 0, 1, 1),)


@lru_cache
def _gathering(widths: Widths) -> tuple[Run, ...]:
    """From pieces to where they belong in each tensor, behind the hidden states on both sides."""
    # Hidden states have one head, which moves by itself.
    return gathering(((1,), *widths))[1:]


@lru_cache
def _one_to_one(shapes: Shapes, chosen: tuple[bool, ...] | None = None) -> tuple[Run, ...]:
    """Each tensor ``[s, b, width, unit]``, or those that are chosen, to one of the same size."""
    numbers = [i for i in range(len(shapes)) if chosen is None or chosen[i]]
    return tuple(Run(i + 1, 0, 1, i + 1, 0, 1, shapes[i][2]) for i in numbers)


def _parts(payload: Tensor, shapes: Shapes) -> list[Tensor]:
    """Views of a contiguous payload: hidden states ``[s, b, 1, h]``, then each tensor ``[s, b, width, unit]``."""
    pieces = payload.view(-1).split([prod(shape) for shape in shapes[1:]])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes[1:], strict=True)]


def _require_shape(what: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise RuntimeError(
            f"{what} between pipeline stages: shape {tuple(tensor.shape)}, expected {expected} from --seq-length, "
            "--micro-batch-size and the model; what crosses layers has one size in all microbatches"
        )
