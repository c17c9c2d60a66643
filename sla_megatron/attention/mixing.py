"""Mixing a layer's own heads with an earlier layer's: one operation forward and one backward, whatever the pattern.

Small models on fast GPUs pay for the number of operations that are started, not for the bytes that these move.
Slicing, concatenating and filling with zeros, left to autograd, is some twenty operations a layer.  Here one function
takes all tensors at once.  Forward copies every head to its place.  Backward writes the gradient of each input whole:
heads that nobody reads are zeros, heads that two outputs have are sums.  A piece of K/V that came from another layer
gets a view of the gradient that attention found.

On a GPU the heads are moved by one kernel (``pipeline/copy_kernel.py``); elsewhere by torch's operations on lists.

Shapes: s sequence, b microbatch, d head size; all tensors are ``[s, b, heads, d]``, of any strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..pipeline.copying import move
from .mixing_plan import MixingPlan


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
