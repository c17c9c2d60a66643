"""Which caches an engine keeps that has one for each attention module, and in what order heads lie.

Legend as in the configuration: layers ``1..L``, groups ``0..G-1``, origins (distances or source layers).  Where keys
and values are shared, each live (layer, group) pair is kept in one cache, with all others that the same layers read; a
layer calls attention once for each cache that it reads:

- what it alone reads, its own and earlier layers' together, lies in one cache of its own: earlier layers hand their
  keys and values on instead of keeping them (``only_here``);
- groups of its own that it reads and the same later layers too have a cache for these (``shared``);
- those later layers read the same cache (``borrowed``).

A cache has as many keys as values.  So where one of the two is shared alone, each layer has one cache of all groups, to
which earlier layers hand what it reads of theirs.

Queries and outputs are put in the order of these calls and keys and values in that of the caches by permuting weights
when they are loaded, so that nothing is moved when the model runs.  For the same reason the groups of one
tensor-parallel rank need not be neighbours: each rank takes an equal share of the groups of each origin.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ..configuration_sla_gpt import SlaGPTConfig
from ..sharing_sla_gpt import SHARES


def rank_groups(config: SlaGPTConfig, ranks: int) -> list[list[int]]:
    """The groups of each tensor-parallel rank, ascending; the same number of each origin in all of them.

    Raises:
        ValueError: where the groups of some origin are not a multiple of ``ranks``, in one line.
    """
    same: dict[int | None, list[int]] = defaultdict(list)
    for group in range(config.num_key_value_heads):
        same[config.origin(group)].append(group)
    for origin, groups in same.items():
        if len(groups) % ranks:
            kind = f"read layer {origin}" if config.sla_source_layers else f"skip {origin} layers"
            kind = "read their own layer" if origin is None else kind
            raise ValueError(
                f"tensor_parallel_size={ranks} must divide the number of groups of each "
                f"{'source layer' if config.sla_source_layers else 'distance'}: {len(groups)} of this model's "
                f"{config.num_key_value_heads} key/value groups {kind}"
            )
    return [
        sorted(g for groups in same.values() for g in groups[rank * len(groups) // ranks :][: len(groups) // ranks])
        for rank in range(ranks)
    ]


@dataclass(frozen=True)
class LayerPlan:
    """What one layer reads and keeps, for one rank's groups.  Lists of groups are ascending.

    Args:
        layer: its number.
        shared_kinds: what the following is said of: keys and values, or one of the two.
        only_here: layer -> groups of which this layer alone reads what that layer projected, ascending, this layer
            among them.  Where one of the two is shared alone, earlier layers' that others read as well.
        shared: later layers -> own groups that this layer reads, and those.
        borrowed: earlier layer -> groups of which that layer keeps the cache.
        handed_on: later layers -> own groups that they alone read.
    """

    layer: int
    shared_kinds: tuple[str, ...]
    only_here: dict[int, list[int]]
    shared: dict[tuple[int, ...], list[int]]
    borrowed: dict[int, list[int]]
    handed_on: dict[tuple[int, ...], list[int]]

    @property
    def is_joined(self) -> bool:
        """Whether there is one cache of all groups, as one of keys and values is shared alone."""
        return len(self.shared_kinds) == 1

    @property
    def calls(self) -> list[list[int]]:
        """The groups of each call of attention, in order."""
        if self.is_joined:
            earlier = [groups for a, groups in self.only_here.items() if a != self.layer]
            return [sum([*self._own, *self.shared.values(), *earlier], [])]
        joined = [sum(self.only_here.values(), [])] if self.only_here else []
        return [*joined, *self.shared.values(), *self.borrowed.values()]

    @property
    def _own(self) -> list[list[int]]:
        return [self.only_here[self.layer]] if self.layer in self.only_here else []

    def projected(self, kind: str) -> list[list[int]]:
        """The groups whose keys, or values, the layer projects, part by part as they are used."""
        if kind not in self.shared_kinds:
            return self.calls
        return [*self._own, *self.shared.values(), *self.handed_on.values()]


def plan_layers(config: SlaGPTConfig, groups: list[int]) -> list[LayerPlan]:
    """One plan per layer, for ``groups`` of one rank."""
    plans, kinds = [], SHARES[config.sla_share]
    is_joined = len(kinds) == 1
    for layer in range(1, config.num_hidden_layers + 1):
        only_here: dict[int, list[int]] = defaultdict(list)
        shared: dict[tuple[int, ...], list[int]] = defaultdict(list)
        borrowed: dict[int, list[int]] = defaultdict(list)
        handed_on: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for group in groups:
            source, readers = config.source(layer, group), tuple(config.readers(layer, group, kinds[0]))
            if source == layer and readers:
                shared[readers].append(group)
            elif source == layer or is_joined or config.source(source, group) != source:
                only_here[source].append(group)
            else:
                borrowed[source].append(group)
            if source != layer and readers:
                handed_on[readers].append(group)
        parts = (only_here, shared, borrowed, handed_on)
        plans.append(LayerPlan(layer, kinds, *(dict(sorted(part.items())) for part in parts)))
    return plans
