"""Heads that are moved together.  Pure Python.

A *head* is an index of the third dimension: tensors are ``[s, b, heads, d]``.  Heads that lie at equal distances on
both sides are one :class:`Run`, which is a slice of each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """``count`` heads of one tensor, and their places in another.

    Attributes:
        source: index of the tensor that they are of; ``None``: zeros.
        source_start: the first of them in it, the others follow by ``source_step``.
        target: index of the tensor that they go to.
        target_start: where the first of them goes, the others follow by ``target_step``.
    """

    source: int | None
    source_start: int
    source_step: int
    target: int
    target_start: int
    target_step: int
    count: int

    @property
    def source_heads(self) -> slice:
        return _slice(self.source_start, self.source_step, self.count)

    @property
    def target_heads(self) -> slice:
        return _slice(self.target_start, self.target_step, self.count)


def _slice(start: int, step: int, count: int) -> slice:
    return slice(start, start + (count - 1) * step + 1, step)
