"""Mixing a layer's own heads with an earlier layer's: one operation forward and one backward, whatever the pattern.

Small models on fast GPUs pay for the number of operations that are started, not for the bytes that these move.
Slicing, concatenating and filling with zeros, left to autograd, is some twenty operations a layer.  Here one function
takes all tensors at once.  Forward copies every head to its place.  Backward writes the gradient of each input whole:
heads that nobody reads are zeros, heads that two outputs have are sums.  A piece of K/V that came from another layer
gets a view of the gradient that attention found.

On a GPU the heads are moved by one kernel (``mixing_kernel.py``); elsewhere by torch's operations on lists.

Shapes: s sequence, b microbatch, d head size; all tensors are ``[s, b, heads, d]``, of any strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import mixing_kernel
from .mixing_plan import MixingPlan, Run


def mix(plan: MixingPlan, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of ``plan``, ``[s, b, heads, d]`` each; differentiable, once."""
    return _Mix.apply(plan, *inputs)


def naive(plan: MixingPlan, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """:func:`mix` spelled out, head by head, with autograd's own gradient: what it is tested against."""
    return tuple(torch.stack([inputs[i][:, :, head] for i, head in heads], dim=2) for heads in plan.outputs)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: MixingPlan, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        outputs = [None if view is None else inputs[view.source][:, :, view.source_heads] for view in plan.views]
        s, b, _, d = inputs[0].shape
        for room in plan.rooms:
            shapes = [(s, b, len(plan.outputs[number]), d) for number in room]
            memory = inputs[0].new_empty(sum(map(math.prod, shapes)))
            pieces = memory.split([math.prod(shape) for shape in shapes])
            for number, piece, shape in zip(room, pieces, shapes, strict=True):
                outputs[number] = piece.view(shape)
        move(outputs, inputs, plan.copies)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: MixingPlan = ctx.plan
        some = next(gradient for gradient in gradients if gradient is not None)
        found: list[Tensor | None] = []
        for heads, view in zip(plan.inputs, plan.gradient_views, strict=True):
            if view is None:
                found.append(_room(some, heads))
            else:
                gradient = gradients[view.source]
                found.append(None if gradient is None else gradient[:, :, view.source_heads])
        move(found, gradients, plan.gradient_copies, plan.gradient_sums)
        return None, *found


def _room(like: Tensor, heads: int) -> Tensor:
    s, b, _, d = like.shape
    return like.new_empty((s, b, heads, d))


def move(
    targets: Sequence[Tensor | None],
    sources: Sequence[Tensor | None],
    copies: Sequence[Run],
    sums: Sequence[Run] = (),
) -> None:
    """Copy heads of ``sources`` to their places in ``targets``, then add those of ``sums`` to what is there.

    Tensors are ``[s, b, heads, d]``; a source that is ``None`` is zeros, a target that is ``None`` is in no run.
    """
    if not copies:
        return
    if mixing_kernel.serves(targets[copies[0].target]) and mixing_kernel.move(targets, sources, copies, sums):
        return
    places = [targets[run.target][:, :, run.target_heads] for run in copies]
    torch._foreach_copy_(places, [_heads(sources, run, place) for run, place in zip(copies, places, strict=True)])
    sums = [run for run in sums if sources[run.source] is not None]
    if sums:
        places = [targets[run.target][:, :, run.target_heads] for run in sums]
        torch._foreach_add_(places, [_heads(sources, run, place) for run, place in zip(sums, places, strict=True)])


def _heads(sources: Sequence[Tensor | None], run: Run, place: Tensor) -> Tensor:
    source = None if run.source is None else sources[run.source]
    if source is None:
        return _zero(place.dtype, place.device).expand_as(place)
    return source[:, :, run.source_heads]


@lru_cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)
