"""Heads of tensors copied to their places in others, all at once: on a GPU by one kernel (``copy_kernel.py``).

Small models on fast GPUs pay for the number of operations that are started, not for the bytes that these move.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import copy_kernel
from .runs import Run


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
    if copy_kernel.serves(targets[copies[0].target]) and copy_kernel.move(targets, sources, copies, sums):
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


def move_of_any_shape(targets: Sequence[Tensor], sources: Sequence[Tensor | None], runs: tuple[Run, ...]) -> None:
    """:func:`move` where heads may be of several shapes, those of a run of one: a launch of the kernel for each."""
    if not runs:
        return
    shapes = tuple((target.shape[0], target.shape[1], target.shape[3]) for target in targets)
    if not copy_kernel.serves(targets[runs[0].target]) or len(set(shapes)) == 1:
        move(targets, sources, runs)
        return
    for alike in _alike(runs, shapes):
        move(targets, sources, alike)


@lru_cache
def _alike(runs: tuple[Run, ...], shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[Run, ...], ...]:
    """``runs`` by the shape of their heads; ``shapes`` are the targets'."""
    found: dict[tuple[int, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(shapes[run.target], []).append(run)
    return tuple(map(tuple, found.values()))
