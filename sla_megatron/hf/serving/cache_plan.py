"""Which caches an engine keeps that has one for each attention module, and in what order heads lie.

Legend as in the configuration: layers ``1..L``, groups ``0..G-1``, distances.  Each live (layer, group) pair is kept in
one cache, with all others that the same layers read; a layer calls attention once for each cache that it reads:

- what it alone reads, its own and earlier layers' together, lies in one cache of its own: earlier layers hand their
  keys and values on instead of keeping them (``only_here``);
- groups of its own that it reads and one later layer too have a cache for each such layer (``shared``);
- that later layer reads the same cache (``borrowed``).

Queries and outputs are put in the order of these calls and keys and values in that of the caches by permuting weights
when they are loaded, so that nothing is moved when the model runs.  For the same reason the groups of one
tensor-parallel rank need not be neighbours: each rank takes an equal share of the groups of each distance.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ..configuration_sla_gpt import SlaGPTConfig


def rank_groups(config: SlaGPTConfig, ranks: int) -> list[list[int]]:
    """The groups of each tensor-parallel rank, ascending; the same number of each distance in all of them.

    Raises:
        ValueError: where the groups of some distance are not a multiple of ``ranks``, in one line.
    """
    same: dict[int | None, list[int]] = defaultdict(list)
    for group in range(config.num_key_value_heads):
        same[config.distance(group)].append(group)
    for distance, groups in same.items():
        if len(groups) % ranks:
            kind = "read their own layer" if distance is None else f"skip {distance} layers"
            raise ValueError(
                f"tensor_parallel_size={ranks} must divide the number of groups of each distance: {len(groups)} of "
                f"this model's {config.num_key_value_heads} key/value groups {kind}"
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
        only_here: layer -> groups whose keys and values of that layer are read in this layer alone, ascending, this
            layer among them.
        shared: later layer -> own groups that this layer reads, and that one.
        borrowed: earlier layer -> groups of which that layer keeps the cache.
        handed_on: later layer -> own groups that it alone reads.
    """

    layer: int
    only_here: dict[int, list[int]]
    shared: dict[int, list[int]]
    borrowed: dict[int, list[int]]
    handed_on: dict[int, list[int]]

    @property
    def calls(self) -> list[list[int]]:
        """The groups of each call of attention, in order."""
        joined = [sum(self.only_here.values(), [])] if self.only_here else []
        return [*joined, *self.shared.values(), *self.borrowed.values()]

    @property
    def projected(self) -> list[list[int]]:
        """The groups whose keys and values the layer projects, part by part as they are used."""
        own = [self.only_here[self.layer]] if self.layer in self.only_here else []
        return [*own, *self.shared.values(), *self.handed_on.values()]


def plan_layers(config: SlaGPTConfig, groups: list[int]) -> list[LayerPlan]:
    """One plan per layer, for ``groups`` of one rank."""
    plans = []
    for layer in range(1, config.num_hidden_layers + 1):
        only_here: dict[int, list[int]] = defaultdict(list)
        shared: dict[int, list[int]] = defaultdict(list)
        borrowed: dict[int, list[int]] = defaultdict(list)
        handed_on: dict[int, list[int]] = defaultdict(list)
        for group in groups:
            source, reader = config.source(layer, group), config.reader(layer, group)
            if source == layer and reader is not None:
                shared[reader].append(group)
            elif source == layer or config.source(source, group) != source:
                only_here[source].append(group)
            else:
                borrowed[source].append(group)
            if source != layer and reader is not None:
                handed_on[reader].append(group)
        parts = (only_here, shared, borrowed, handed_on)
        plans.append(LayerPlan(layer, *(dict(sorted(part.items())) for part in parts)))
    return plans
