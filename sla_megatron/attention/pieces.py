"""Into which pieces a layer cuts its keys and values, and of which it joins those that it reads.  Pure Python.

Mixing a layer's own K/V with a source layer's takes one copy of each into the tensor that attention reads, and where
the source reads its own, no other (``self_attention.py``).  Groups that lie side by side and go the same way are one
piece.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from .roles import BundleName, LayerRole


@dataclass(frozen=True)
class Pieces:
    """One layer's pieces, on one tensor-parallel rank.

    Attributes:
        own_sizes: how many groups are in each piece of the layer's own projection, in order.
        put_pieces: bundle that this layer hands on -> which of the own pieces it is made of.
        taken_sizes: bundle that this layer reads -> how many groups are in each of its pieces.
        read_pieces: the pieces that this layer's K/V are joined of, in order: ``(None, i)`` is the i-th own one,
            ``(bundle, i)`` the i-th of a bundle.
    """

    own_sizes: tuple[int, ...]
    put_pieces: dict[BundleName, tuple[int, ...]]
    taken_sizes: dict[BundleName, tuple[int, ...]]
    read_pieces: tuple[tuple[BundleName | None, int], ...]

    @classmethod
    def of(cls, role: LayerRole, merged: bool) -> Pieces:
        """The pieces of ``role``; without ``merged``, own pieces of one group each: they do not lie side by side."""
        bundle_of = {index: name for name, indices in role.puts.items() for index in indices}
        read_here = {index for origin, index in role.read if origin is None}
        ways = [(bundle_of.get(i), i in read_here, None if merged else i) for i in range(len(role.projected))]
        own_sizes = _runs(ways)

        first_of: dict[int, int] = {}
        start = 0
        for piece, size in enumerate(own_sizes):
            first_of[start] = piece
            start += size

        taken_sizes: dict[BundleName, tuple[int, ...]] = {}
        for name in role.takes:
            places = [place for place, (origin, _) in enumerate(role.read) if origin == name]
            taken_sizes[name] = _runs([place - i for i, place in enumerate(places)])

        read_pieces: list[tuple[BundleName | None, int]] = []
        seen = dict.fromkeys(role.takes, 0)
        for place, (origin, index) in enumerate(role.read):
            if origin is None:
                if index in first_of:
                    read_pieces.append((None, first_of[index]))
            elif place == 0 or role.read[place - 1][0] != origin:
                read_pieces.append((origin, seen[origin]))
                seen[origin] += 1

        put_pieces = {
            name: tuple(first_of[index] for index in indices if index in first_of)
            for name, indices in role.puts.items()
        }
        return cls(own_sizes, put_pieces, taken_sizes, tuple(read_pieces))


def _runs(values: Iterable[object]) -> tuple[int, ...]:
    """How many equal values follow each other: ``a a b a`` is ``2 1 1``."""
    return tuple(len(list(run)) for _, run in groupby(values))
