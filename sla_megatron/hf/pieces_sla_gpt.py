"""Parts of SLA-GPT's tensors, taken with few operations: heads in another order, rows of weights that are read.

This file goes into exported folders: it needs torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class Pieces:
    """Takes heads out in another order.

    By views, and a concatenation where neighbours are torn apart; but for a single token, in generation, one operation
    with an index does that: its time is mostly that of starting operations.  The index is no buffer, which would have
    to be filled after loading: each device's is made when it is first used.

    Args:
        orders: lists of head indices; together each index at most once.
        total: how many heads there are.
        width: how many elements of the tensor's dimension belong to one index.
    """

    def __init__(self, orders: Sequence[Sequence[int]], total: int, width: int = 1) -> None:
        starts = {0} | {order[0] for order in orders} | {order[-1] + 1 for order in orders}
        starts |= {cut for order in orders for a, b in pairwise(order) if b != a + 1 for cut in (a + 1, b)}
        starts = sorted(starts - {total})
        self.sizes = [(b - a) * width for a, b in pairwise([*starts, total])]
        piece_of = {start: piece for piece, start in enumerate(starts)}
        self.pieces = [[piece_of[index] for index in order if index in piece_of] for order in orders]

        #: For each element of the tensors that ``take`` gives, one after the other, where it is taken from.
        self.order = [index * width + i for order in orders for index in order for i in range(width)]
        self.taken = [len(order) * width for order in orders]
        self.is_identity = len(orders) == 1 and self.order == list(range(total * width))
        self.is_torn = any(len(pieces) > 1 for pieces in self.pieces)
        #: The orders, by where they begin.
        self.by_place = sorted(range(len(orders)), key=lambda number: self.pieces[number])
        self._indices: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def take(self, x: Tensor, dim: int, by_index: bool = False) -> list[Tensor]:
        """One tensor per order."""
        if self.is_identity:
            return [x]
        if self.is_torn and by_index:
            taken = x.index_select(dim, self._index(x.device)[0])
            return [taken] if len(self.taken) == 1 else list(taken.split(self.taken, dim))
        split = x.split_with_sizes(self.sizes, dim)
        return [_cat([split[piece] for piece in pieces], dim) for pieces in self.pieces]

    def put_back(self, outputs: Sequence[Tensor], dim: int, by_index: bool = False) -> Tensor:
        """The tensors that ``take`` gave (or others of their sizes), together in the original order."""
        if self.is_identity:
            return outputs[0]
        if self.is_torn and by_index:
            return _cat(outputs, dim).index_select(dim, self._index(outputs[0].device)[1])
        if not self.is_torn:
            return torch.cat([outputs[order] for order in self.by_place], dim)
        found: dict[int, Tensor] = {}
        for output, pieces in zip(outputs, self.pieces, strict=True):
            parts = [output] if len(pieces) == 1 else output.split([self.sizes[piece] for piece in pieces], dim)
            found.update(zip(pieces, parts, strict=True))
        return _cat([found[piece] for piece in sorted(found)], dim)

    def _index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``order`` and its inverse."""
        if device not in self._indices:
            order = torch.tensor(self.order)
            self._indices[device] = (order.to(device), order.argsort().to(device))
        return self._indices[device]


class LiveRows:
    """The rows of a layer's K/V weights that some layer reads, keys' and values' together: one projection for both.

    A copy, at most half as large as those of all groups.  It is made with each prompt and serves the tokens that
    follow: gathering it for each of them would cost more than their projection.  In no state dict, copy or pickle of
    the model.

    Args:
        rows: their numbers, in the order in which the layer's keys and values are kept; of keys as of values.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = list(rows)
        self._made: tuple[list[_Seen], Tensor, Tensor | None] | None = None

    def of(self, projections: Sequence[nn.Linear], afresh: bool) -> tuple[Tensor, Tensor | None]:
        """Weight ``[2 * rows, h]`` and bias.

        Args:
            projections: of keys and of values.
            afresh: not those of a call before, if only for changes that nobody can see: ``weight.data`` counts no
                versions.
        """
        weights = [projection.weight for projection in projections]
        biases = [projection.bias for projection in projections if projection.bias is not None]
        made = self._made
        if afresh or made is None or not all(map(_Seen.is_same, made[0], [*weights, *biases])):
            seen = [_Seen(tensor) for tensor in (*weights, *biases)]
            index = torch.tensor(self.rows, device=weights[0].device)
            gathered = [
                torch.cat([t.index_select(0, index) for t in same]) if same else None for same in (weights, biases)
            ]
            self._made = made = (seen, *gathered)
        return made[1:]

    def drop(self) -> None:
        self._made = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_made": None}


class _Seen:
    """A parameter as it was: the same one, with the same memory, unchanged since."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.state = weakref.ref(parameter), self._state(parameter)

    def is_same(self, parameter: Tensor) -> bool:
        return self.parameter() is parameter and self.state == self._state(parameter)

    @staticmethod
    def _state(parameter: Tensor) -> tuple[int, int]:
        # Made in inference mode, a parameter counts no versions, and nothing but inference mode may change it.
        return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def is_eager_inference() -> bool:
    """Neither are gradients wanted, which an index made in inference mode could not serve, nor does a compiler fuse."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
