"""What one layer of SLA-GPT reads, keeps and projects: of its keys, of its values, and of both together.

Shapes: b batch, S all tokens, d head size, G key/value groups, N groups of which a layer keeps keys (or values), R
blocks of groups that do the same in every layer (the configuration's ``G / period``).

This file goes into exported folders: it needs torch and the other ``*_sla_gpt.py`` files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .configuration_sla_gpt import SlaGPTConfig
from .pieces_sla_gpt import Pieces
from .sharing_sla_gpt import KINDS


class Place(NamedTuple):
    """Where groups are kept: which of the tensors that a layer reads, and their slice of each block there."""

    store: int
    first: int
    count: int
    total: int


class Reads:
    """Of keys or of values, by the layer's number, from 1."""

    def __init__(self, config: SlaGPTConfig, number: int, kind: str) -> None:
        period = config.period
        reads = config.reads_in_block(number, kind)
        kept = [config.stored_in_block(a, kind) for a in reads]
        #: Of each layer that is read, itself the last.
        self.places = [
            Place(store, kept[store].index(groups[0]), len(groups), len(kept[store]))
            for store, groups in enumerate(reads.values())
        ]
        self.reads_own = number in reads
        #: The earlier ones, counted from 1.
        self.source_layers = [a for a in reads if a != number]
        #: Of one block: where what is read goes among all groups.
        self.pieces = Pieces(list(reads.values()), period)
        projected = [g for g in config.projected_groups(number, kind) if g < period]
        stored = config.stored_in_block(number, kind)
        #: Of one block: groups that there are weights for, and which of them are kept.
        self.projected_in_block = len(projected)
        self.stored = [projected.index(g) for g in stored]
        self.stored_pieces = Pieces([self.stored], len(projected)) if stored else None

    def joined(self, stores: Sequence[Tensor]) -> Tensor:
        """What is read of each, ``[b, N, S, d]``, of all groups in their order, ``[b, G, S, d]``.

        A copy, where not all is of one layer: little beside what several tokens make of it.
        """
        if self.pieces.is_identity and self.reads_own:
            return stores[-1]
        is_one_block = stores[0].shape[1] == self.places[0].total
        dim = 1 if is_one_block else 2
        parts = []
        for store, (_, first, count, total) in zip(stores, self.places, strict=True):
            block = store if is_one_block else store.unflatten(1, (-1, total))
            # A view that changes nothing would cost time too.
            parts.append(block if count == total else block.narrow(dim, first, count))
        joined = self.pieces.put_back(parts, dim)
        return joined if is_one_block else joined.flatten(1, 2)


def kept_at(store: Tensor, place: Place) -> Tensor:
    """Of ``[b, N, S, d]`` a view of the groups at ``place``, ``[b * R, count, S, d]``."""
    blocks = store.reshape(-1, place.total, *store.shape[2:])
    # A view that changes nothing would cost time too.
    return blocks.narrow(1, place.first, place.count) if place.count < place.total else blocks


class Part(NamedTuple):
    """Groups of a block whose keys are one slice of what some layer keeps, and whose values are one too."""

    groups: list[int]
    key: Place
    value: Place


def parts_of(config: SlaGPTConfig, number: int) -> list[Part] | None:
    """All groups of a block, of layer ``number``; ``None`` where keys and values are not in the same order."""
    parts = []
    reads = {kind: config.reads_in_block(number, kind) for kind in KINDS}
    for value_store, (value_layer, values) in enumerate(reads["value"].items()):
        for key_store, (key_layer, keys) in enumerate(reads["key"].items()):
            groups = [g for g in values if g in keys]
            if not groups:
                continue
            places = []
            for kind, store, layer in (("key", key_store, key_layer), ("value", value_store, value_layer)):
                kept = config.stored_in_block(layer, kind)
                first = kept.index(groups[0])
                if kept[first : first + len(groups)] != groups:
                    return None
                places.append(Place(store, first, len(groups), len(kept)))
            parts.append(Part(groups, *places))
    return parts
