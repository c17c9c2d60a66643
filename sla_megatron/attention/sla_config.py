"""What skip-layer attention means for one model: which groups skip, from where, and which projections are live.

Pure Python, no torch: the same object answers the flags' validation, the attention modules, checkpoints and reports.

Legend: ``L`` layers numbered ``1..L``; ``G`` key/value groups (query groups) numbered ``0..G-1``, ``G = H`` without
grouped-query attention; ``n`` a skip distance in layers.  Source: "Skip-Layer Attention: Bridging Abstract and Detailed
Dependencies in Transformers", arXiv 2406.11274.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

KV_PROJECTIONS = ("full", "pruned")

#: The paper's best setting, as a share of the layers and of the groups.
DEFAULT_SHARE = 0.75


def default_skip_distance(num_layers: int) -> int:
    """``round(0.75 L)`` (halves to even, as Python rounds); 9 for the paper's 12 layers."""
    return round(DEFAULT_SHARE * num_layers)


def default_num_skip_groups(num_query_groups: int) -> int:
    """``round(0.75 G)`` (halves to even, as Python rounds); 9 for the paper's 12 heads."""
    return round(DEFAULT_SHARE * num_query_groups)


def evenly_spread(count: int, total: int) -> tuple[int, ...]:
    """``count`` of ``0..total-1``, spread evenly: ``g`` is in where ``floor((g+1)k/G) > floor(gk/G)``.

    A property of the whole model, independent of the tensor-parallel size; 9 of 12 is ``NSSS NSSS NSSS``.
    """
    return tuple(g for g in range(total) if (g + 1) * count // total > g * count // total)


@dataclass(frozen=True)
class SLAConfig:
    """Skip-layer attention of one model.

    Args:
        num_layers: ``L``.
        num_query_groups: ``G``.
        skip_distances: ``n_0 .. n_{D-1}``, each >= 1; the j-th skip group uses ``n_{j mod D}``.  The paper has one.
        num_skip_groups: ``k``, how many groups skip, ``0..G``.
        layers: consumer layers, 1-based and ascending; ``None`` means every layer beyond the distance.
        kv_projection: ``"full"`` keeps dead projections, ``"pruned"`` leaves them out.

    Raises:
        ValueError: for values outside these ranges.  Flags are checked, with their names, in ``validation.py``.
    """

    num_layers: int
    num_query_groups: int
    skip_distances: tuple[int, ...]
    num_skip_groups: int
    layers: tuple[int, ...] | None = None
    kv_projection: str = "full"

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_query_groups < 1:
            raise ValueError(f"need at least one layer and one group: {self}")
        if not self.skip_distances or min(self.skip_distances) < 1:
            raise ValueError(f"skip_distances must be one or more integers >= 1: {self.skip_distances}")
        if not 0 <= self.num_skip_groups <= self.num_query_groups:
            raise ValueError(f"num_skip_groups must be 0..{self.num_query_groups}: {self.num_skip_groups}")
        if self.layers is not None and not set(self.layers) <= set(range(1, self.num_layers + 1)):
            raise ValueError(f"layers must be within 1..{self.num_layers}: {self.layers}")
        if self.kv_projection not in KV_PROJECTIONS:
            raise ValueError(f"kv_projection must be one of {KV_PROJECTIONS}: {self.kv_projection}")

    @cached_property
    def skip_groups(self) -> tuple[int, ...]:
        """``S``, ascending."""
        return evenly_spread(self.num_skip_groups, self.num_query_groups)

    @cached_property
    def distance_of_group(self) -> dict[int, int]:
        """Skip group -> its distance: the j-th skip group takes ``n_{j mod D}``."""
        return {g: self.skip_distances[j % len(self.skip_distances)] for j, g in enumerate(self.skip_groups)}

    def source(self, layer: int, group: int) -> int:
        """The layer whose K/V ``group`` reads in ``layer``: ``layer - n`` for a skip head, else ``layer``."""
        distance = self.distance_of_group.get(group)
        if distance is None or layer <= distance or (self.layers is not None and layer not in self.layers):
            return layer
        return layer - distance

    def consumer(self, layer: int, group: int) -> int | None:
        """The later layer that reads ``(layer, group)``, or ``None``.

        There is at most one: a group has one distance, in every layer.
        """
        later = layer + self.distance_of_group.get(group, self.num_layers)
        return later if later <= self.num_layers and self.source(later, group) == layer else None

    def is_live(self, layer: int, group: int) -> bool:
        """Whether anything reads the K/V that ``layer`` projects for ``group``: the layer itself or a later one."""
        return self.source(layer, group) == layer or self.consumer(layer, group) is not None

    def live_groups(self, layer: int) -> tuple[int, ...]:
        """The groups of ``layer`` whose K/V are live, ascending."""
        return tuple(g for g in range(self.num_query_groups) if self.is_live(layer, g))

    def projected_groups(self, layer: int) -> tuple[int, ...]:
        """The groups whose K/V ``layer`` projects: all of them, or with ``pruned`` the live ones."""
        return self.live_groups(layer) if self.kv_projection == "pruned" else tuple(range(self.num_query_groups))

    @cached_property
    def consumer_layers(self) -> tuple[int, ...]:
        """The layers in which at least one group skips, ascending."""
        every_layer = range(1, self.num_layers + 1)
        return tuple(m for m in every_layer if any(self.source(m, g) != m for g in self.skip_groups))

    @property
    def is_dense(self) -> bool:
        """Whether no head skips at all, so that the model is the standard Transformer."""
        return not self.consumer_layers

    @cached_property
    def num_dead(self) -> int:
        """Dead (layer, group) pairs of the whole model."""
        return sum(self.num_query_groups - len(self.live_groups(m)) for m in range(1, self.num_layers + 1))

    def rank_groups(self, tensor_parallel_size: int, rank: int) -> range:
        """The groups that tensor-parallel ``rank`` holds: Megatron gives each rank ``G/T`` neighbouring ones."""
        share = self.num_query_groups // tensor_parallel_size
        return range(rank * share, (rank + 1) * share)

    def pattern(self) -> str:
        """One letter a group, ``S`` skips and ``N`` does not."""
        return "".join("S" if g in self.distance_of_group else "N" for g in range(self.num_query_groups))


def compact_ranges(layers: Sequence[int]) -> str:
    """``(4, 6, 8, 9, 10)`` as ``"4,6,8-10"``, the syntax of ``--sla-layers``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
