"""Pieces of tensors put together: one operation forward, none backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .copying import move_of_any_shape
from .runs import Run

#: How many pieces each of several tensors has along its width, and how wide each piece is.
Widths = tuple[tuple[int, ...], ...]


def joined(tensors: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Each tensor whole, in memory of its own: no view of something larger that it would keep alive.

    Pieces are ``[s, b, width, unit]``.  What is whole already stays as it is.
    """
    if all(len(pieces) == 1 and pieces[0].is_contiguous() for pieces in tensors):
        return tuple(pieces[0] for pieces in tensors)
    widths = tuple(tuple(piece.shape[2] for piece in pieces) for pieces in tensors)
    return _Join.apply(widths, *chain(*tensors))


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, widths: Widths, *pieces: Tensor) -> tuple[Tensor, ...]:
        ctx.widths = widths
        ctx.set_materialize_grads(False)
        first = [sum(map(len, widths[:i])) for i in range(len(widths))]
        shapes = [(*pieces[i].shape[:2], sum(its), pieces[i].shape[3]) for i, its in zip(first, widths, strict=True)]
        wholes = [pieces[0].new_empty(shape) for shape in shapes]
        move_of_any_shape(wholes, pieces, gathering(widths))
        return tuple(wholes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        for gradient, its in zip(gradients, ctx.widths, strict=True):
            found += [None] * len(its) if gradient is None else gradient.split(its, dim=2)
        return None, *found


@lru_cache
def gathering(widths: Widths) -> tuple[Run, ...]:
    """From pieces, numbered through all tensors, to where they belong in each whole one."""
    runs: list[Run] = []
    for whole, its in enumerate(widths):
        for i, width in enumerate(its):
            runs.append(Run(len(runs), 0, 1, whole, sum(its[:i]), 1, width))
    return tuple(runs)
