"""What skip-layer attention means for one model: which tensor of which group is read from where, and which are live.

Pure Python, no torch: the same object answers the flags' validation, the attention modules, checkpoints and reports.

Legend: ``L`` layers numbered ``1..L``; ``G`` key/value groups (query groups) numbered ``0..G-1``, ``G = H`` without
grouped-query attention; ``n`` a skip distance in layers.  Each layer has two tensors of a group, key and value, which
are shared, read and live each by itself.  Source: "Skip-Layer Attention: Bridging Abstract and Detailed Dependencies in
Transformers", arXiv 2406.11274; it shares both, at a distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

KV_PROJECTIONS = ("full", "pruned")

Kind = Literal["key", "value"]
KINDS: tuple[Kind, ...] = ("key", "value")

#: What skip groups take from their source -> the tensors.
SHARES: dict[str, tuple[Kind, ...]] = {"kv": KINDS, "values": ("value",), "keys": ("key",)}

#: The paper's best setting, as a share of the layers and of the groups.
DEFAULT_SHARE = 0.75


def of_share(share: float, whole: int) -> int:
    """A share of ``whole`` layers or groups, rounded (halves to even, as Python rounds), and at least 1."""
    return max(1, round(share * whole))


def default_skip_distance(num_layers: int) -> int:
    """``round(0.75 L)`` (halves to even, as Python rounds); 9 for the paper's 12 layers."""
    return of_share(DEFAULT_SHARE, num_layers)


def default_num_skip_groups(num_query_groups: int) -> int:
    """``round(0.75 G)`` (halves to even, as Python rounds); 9 for the paper's 12 heads."""
    return of_share(DEFAULT_SHARE, num_query_groups)


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
        layers: consumer layers, 1-based and ascending; ``None`` means every layer behind the source.
        kv_projection: ``"full"`` keeps dead projections, ``"pruned"`` leaves them out.
        share: what skip groups take from their source, one of ``SHARES``; the rest is their own.
        source_layers: in place of distances, ``N_0 .. N_{D-1}``: the j-th skip group reads ``N_{j mod D}`` in every
            consumer layer behind it.

    Raises:
        ValueError: for values outside these ranges.  Flags are checked, with their names, in ``flags/skipping.py``.
    """

    num_layers: int
    num_query_groups: int
    skip_distances: tuple[int, ...]
    num_skip_groups: int
    layers: tuple[int, ...] | None = None
    kv_projection: str = "full"
    share: str = "kv"
    source_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_query_groups < 1:
            raise ValueError(f"need at least one layer and one group: {self}")
        if bool(self.skip_distances) == bool(self.source_layers):
            raise ValueError(f"need either skip_distances or source_layers: {self}")
        if any(distance < 1 for distance in self.skip_distances):
            raise ValueError(f"skip_distances must be one or more integers >= 1: {self.skip_distances}")
        for name, some in (("layers", self.layers or ()), ("source_layers", self.source_layers)):
            if not set(some) <= set(range(1, self.num_layers + 1)):
                raise ValueError(f"{name} must be within 1..{self.num_layers}: {some}")
        if not 0 <= self.num_skip_groups <= self.num_query_groups:
            raise ValueError(f"num_skip_groups must be 0..{self.num_query_groups}: {self.num_skip_groups}")
        for name, choices in (("kv_projection", KV_PROJECTIONS), ("share", tuple(SHARES))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}: {getattr(self, name)}")

    @property
    def shared_name(self) -> str:
        """What crosses layers, as tables and messages call it: K/V, values, or keys."""
        return "K/V" if self.share == "kv" else self.share

    @property
    def shared_kinds(self) -> tuple[Kind, ...]:
        """The tensors that skip groups take from their source."""
        return SHARES[self.share]

    @cached_property
    def skip_groups(self) -> tuple[int, ...]:
        """``S``, ascending."""
        return evenly_spread(self.num_skip_groups, self.num_query_groups)

    @cached_property
    def _sources(self) -> dict[tuple[int, int], int]:
        """(layer, group) -> the earlier layer that it reads, for all that skip."""
        found = {}
        for layer in range(1, self.num_layers + 1) if self.layers is None else self.layers:
            for j, group in enumerate(self.skip_groups):
                if self.source_layers:
                    source = self.source_layers[j % len(self.source_layers)]
                else:
                    source = layer - self.skip_distances[j % len(self.skip_distances)]
                if 1 <= source < layer:
                    found[layer, group] = source
        return found

    @cached_property
    def _readers(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """(layer, group) -> the later layers that read it, ascending; those that none reads are left out."""
        found: dict[tuple[int, int], tuple[int, ...]] = {}
        for (layer, group), source in sorted(self._sources.items()):
            found[source, group] = (*found.get((source, group), ()), layer)
        return found

    def source(self, layer: int, group: int) -> int:
        """The layer from which ``group`` takes what it shares in ``layer``: an earlier one, else ``layer`` itself."""
        return self._sources.get((layer, group), layer)

    def source_of(self, layer: int, group: int, kind: Kind) -> int:
        """The layer whose tensor of that kind ``group`` reads in ``layer``."""
        return self.source(layer, group) if kind in self.shared_kinds else layer

    def readers(self, layer: int, group: int, kind: Kind) -> tuple[int, ...]:
        """The later layers that read the tensor of ``(layer, group)``, ascending."""
        return self._readers.get((layer, group), ()) if kind in self.shared_kinds else ()

    def is_live(self, layer: int, group: int, kind: Kind) -> bool:
        """Whether anything reads that tensor, which ``layer`` projects for ``group``: itself or a later layer."""
        return self.source_of(layer, group, kind) == layer or bool(self.readers(layer, group, kind))

    def live_groups(self, layer: int, kind: Kind) -> tuple[int, ...]:
        """The groups of ``layer`` whose tensor of that kind is live, ascending."""
        return tuple(g for g in range(self.num_query_groups) if self.is_live(layer, g, kind))

    def projected_groups(self, layer: int, kind: Kind) -> tuple[int, ...]:
        """The groups whose tensor ``layer`` projects: all of them, or with ``pruned`` the live ones."""
        return self.live_groups(layer, kind) if self.kv_projection == "pruned" else tuple(range(self.num_query_groups))

    def num_live(self, layer: int) -> int:
        """Keys and values of ``layer`` that are live, together."""
        return sum(len(self.live_groups(layer, kind)) for kind in KINDS)

    @cached_property
    def consumer_layers(self) -> tuple[int, ...]:
        """The layers in which at least one group skips, ascending."""
        return tuple(sorted({layer for layer, _ in self._sources}))

    @property
    def is_dense(self) -> bool:
        """Whether no head skips at all, so that the model is the standard Transformer."""
        return not self.consumer_layers

    def num_dead(self, kind: Kind) -> int:
        """Dead tensors of that kind, one for each (layer, group), of the whole model."""
        return sum(self.num_query_groups - len(self.live_groups(m, kind)) for m in range(1, self.num_layers + 1))

    def dead_parameters(self, head_size: int, row: int, key_norm: int) -> int:
        """Parameters that nobody reads, which ``pruned`` leaves out.

        Args:
            head_size: rows of one key, or value, in its projection.
            row: parameters of a row, its bias with it.
            key_norm: parameters of a layer's norm of keys, which a layer without a live key has no use for.
        """
        without_keys = sum(not self.live_groups(layer, "key") for layer in range(1, self.num_layers + 1))
        return head_size * row * sum(map(self.num_dead, KINDS)) + without_keys * key_norm

    def rank_groups(self, tensor_parallel_size: int, rank: int) -> range:
        """The groups that tensor-parallel ``rank`` holds: Megatron gives each rank ``G/T`` neighbouring ones."""
        share = self.num_query_groups // tensor_parallel_size
        return range(rank * share, (rank + 1) * share)

    def pattern(self) -> str:
        """One letter a group, ``S`` skips and ``N`` does not."""
        return "".join("S" if g in self.skip_groups else "N" for g in range(self.num_query_groups))

    def origin(self) -> str:
        """Where skip groups read: ``distance 9``, or ``source layer 1``; all numbers where there are several."""
        if self.source_layers:
            return f"source layer {' '.join(map(str, self.source_layers))}"
        return f"distance {' '.join(map(str, self.skip_distances))}"


def compact_ranges(layers: Sequence[int]) -> str:
    """``(4, 6, 8, 9, 10)`` as ``"4,6,8-10"``, the syntax of ``--sla-layers``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def describe(sla: SLAConfig | None, is_hybrid: bool = False) -> str:
    """What skips, from where, in which layers, as one line; of a hybrid model these are attention layers."""
    if sla is None:
        return "off"
    if sla.is_dense:
        return "no head skips with these settings: this is the standard Transformer"
    shares = {"kv": "", "values": " and share values alone", "keys": " and share keys alone"}[sla.share]
    layers = "attention layers" if is_hybrid else "layers"
    kept = "kept" if sla.kv_projection == "full" else "left out"
    what = {"kv": "K/V", "values": "V", "keys": "K"}[sla.share]
    dead = max(map(sla.num_dead, sla.shared_kinds))
    return (
        f"{sla.origin()}; {sla.num_skip_groups} of {sla.num_query_groups} K/V groups skip ({sla.pattern()}){shares}; "
        f"in {layers} {compact_ranges(sla.consumer_layers)} of {sla.num_layers}; "
        f"{dead} of {sla.num_layers * sla.num_query_groups} {what} projections are dead and {kept}"
    )
