"""Which layer each group of SLA-GPT takes its keys and its values from: the mathematics of skip-layer attention.

Legend: ``L`` layers numbered ``1..L``; ``G`` key/value groups numbered ``0..G-1``.  What is shared is told apart by
kind, ``key`` or ``value``: with ``sla_share`` ``values`` a skip group's keys are its own layer's.  Sources: arXiv
2406.11274; one source with many readers, arXiv 2510.16807 (SkipV1Former) and 2405.12981 (CLA).

This file goes into exported folders: it needs nothing.
"""

from __future__ import annotations

from copy import copy
from typing import Any

#: The tensors that a layer projects for a group, in the order in which they are handed on.
KINDS = ("key", "value")

#: What skip groups take from another layer.
SHARES = {"kv": KINDS, "values": ("value",), "keys": ("key",)}


class Sharing:
    """What a configuration with the ``sla_*`` fields means."""

    def origin(self, group: int) -> int | None:
        """The skip distance of ``group``, or with source layers the one that it reads; ``None`` if it never skips."""
        origins = self.sla_source_layers or self.sla_skip_distances
        if not origins or group not in self.sla_skip_groups:
            return None
        return origins[self.sla_skip_groups.index(group) % len(origins)]

    def source(self, layer: int, group: int) -> int:
        """Where ``group`` reads in ``layer`` what it shares, both 1-based: an earlier layer for a skip head."""
        origin = self.origin(group)
        if origin is None or layer not in self.sla_layers or layer <= origin:
            return layer
        return origin if self.sla_source_layers else layer - origin

    def source_of(self, layer: int, group: int, kind: str) -> int:
        """Where ``group`` reads its ``kind`` in ``layer``."""
        return self.source(layer, group) if kind in SHARES[self.sla_share] else layer

    def readers(self, layer: int, group: int, kind: str) -> list[int]:
        """The later layers that read the ``kind`` of ``(layer, group)``, ascending.

        With distances at most one, as a group has one distance.
        """
        origin = self.origin(group)
        if origin is None or kind not in SHARES[self.sla_share]:
            return []
        if self.sla_source_layers:
            return [m for m in self.sla_layers if m > layer] if origin == layer else []
        return [layer + origin] if layer + origin in self.sla_layers else []

    def live_groups(self, layer: int, kind: str) -> list[int]:
        """The groups of ``layer`` whose ``kind`` some layer reads, ascending."""
        groups = range(self.num_key_value_heads)
        return [g for g in groups if self.source_of(layer, g, kind) == layer or self.readers(layer, g, kind)]

    def projected_groups(self, layer: int, kind: str) -> list[int]:
        """The groups for whose ``kind`` ``layer`` has weights, ascending."""
        if self.sla_kv_projection == "pruned":
            return self.live_groups(layer, kind)
        return list(range(self.num_key_value_heads))

    @property
    def period(self) -> int:
        """After how many groups their origins repeat: 4 for ``NSSS NSSS NSSS``.

        ``G / period`` blocks of groups then do the same in every layer, block by block.
        """
        total = self.num_key_value_heads
        origins = [self.origin(g) for g in range(total)]
        return next(p for p in range(1, total + 1) if total % p == 0 and origins == origins[:p] * (total // p))

    def stored_in_block(self, layer: int, kind: str) -> list[int]:
        """The live groups of ``layer`` among the first ``period`` ones, in the order in which their ``kind`` is kept.

        What each layer reads of them is one slice, a view.  Their own order is such a one in most models.  Otherwise,
        first come those that only later layers read, then those that the layer reads too, in both parts together by
        later readers: groups of one reader have the same origin, so that either all of them or none are read by the
        layer itself as well, and by the same other ones.
        """
        period = self.period
        live = [g for g in self.live_groups(layer, kind) if g < period]
        readers = {g: self.readers(layer, g, kind) for g in live}
        parts = [[g for g in live if self.source_of(layer, g, kind) == layer]]
        parts += [[g for g in live if m in readers[g]] for m in {m for found in readers.values() for m in found}]
        # Whether each of them stands in the live ones without a gap.
        if all(live[live.index(part[0]) :][: len(part)] == part for part in parts if part):
            return live
        return sorted(live, key=lambda g: (self.source_of(layer, g, kind) == layer, readers[g] or [layer], g))

    def stored_groups(self, layer: int, kind: str) -> list[int]:
        """The live groups of ``layer`` in the order in which their ``kind`` is kept: block by block."""
        block = self.stored_in_block(layer, kind)
        return [start + g for start in range(0, self.num_key_value_heads, self.period) for g in block]

    def reads_in_block(self, layer: int, kind: str) -> dict[int, list[int]]:
        """Source layer, ascending -> the ``kind`` that ``layer`` reads of its first ``period`` groups, as stored."""
        sources = sorted({self.source_of(layer, g, kind) for g in range(self.period)})
        return {a: [g for g in self.stored_in_block(a, kind) if self.source_of(layer, g, kind) == a] for a in sources}

    # What transformers' caches ask.

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """A layer marked ``reuse`` keeps nothing of its own."""
        layers = range(1, self.num_hidden_layers + 1)
        return [None if any(self.live_groups(m, kind) for kind in KINDS) else "reuse" for m in layers]

    @property
    def per_layer_config(self) -> list[Any]:
        """For caches that are made before they are filled: ``num_key_value_heads`` is what a layer keeps.

        These have one number for keys and values: the larger one.  A layer that keeps nothing has no cache
        (``kv_sharing_modes``), or one of length 0, and no size.
        """
        layers = [copy(self) for _ in range(self.num_hidden_layers)]
        for number, layer in enumerate(layers, start=1):
            layer.num_key_value_heads = max(len(self.live_groups(number, kind)) for kind in KINDS)
        return layers
