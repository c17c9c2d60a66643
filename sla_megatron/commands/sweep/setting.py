"""Skip-layer attention as a coordinate of a sweep: what a run's name, its flags and its row say of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from ...attention.sla_config import SHARES

#: What a row has always had.
_BEFORE = ("distances", "skip_groups", "kv_projection", "layers")


@dataclass(frozen=True)
class Setting:
    """Skip-layer attention of a run; neither distances nor sources: dense.

    Attributes:
        distances, sources: of one there are none: distances in layers, or the layers that are read.
        skip_groups: K/V groups that skip.
        kv_projection, layers, share: as the flags have them; no layers: all eligible ones.
        ffn_hidden_size: of the MLP, where it is another than the dense model's: what ``pruned`` leaves out is made up
            for there.
        label: the setting's name in reports.  Names nothing else, so that a grid may be given names later.
    """

    distances: tuple[int, ...] = ()
    skip_groups: int = 0
    kv_projection: str = "full"
    layers: str | None = None
    share: str = "kv"
    sources: tuple[int, ...] = ()
    ffn_hidden_size: int | None = None
    label: str | None = field(default=None, compare=False)

    @property
    def is_dense(self) -> bool:
        return not self.distances and not self.sources

    @property
    def name(self) -> str:
        """``dense``, ``n6-k6``, ``n2+4-k4-in5_7-8-pruned``, ``from1-k4-values``, ``n1-k8-in2-8by2-pruned-ffn300``."""
        if self.is_dense:
            return "dense"
        read = f"n{'+'.join(map(str, self.distances))}" if self.distances else f"from{'+'.join(map(str, self.sources))}"
        parts = [read, f"k{self.skip_groups}"]
        if self.share != "kv":
            parts.append(self.share)
        if self.layers is not None:
            parts.append("in" + self.layers.replace(",", "_").replace("/", "by"))
        if self.kv_projection != "full":
            parts.append(self.kv_projection)
        if self.ffn_hidden_size is not None:
            parts.append(f"ffn{self.ffn_hidden_size}")
        return "-".join(parts)

    @property
    def flags(self) -> tuple[str, ...]:
        """What the run has beyond the dense one: the ``--sla`` flags, and the MLP's; none of a dense run."""
        if self.is_dense:
            return ()
        read = ("--sla-skip-distance", self.distances) if self.distances else ("--sla-source-layer", self.sources)
        flags = ["--sla", read[0], *map(str, read[1])]
        flags += ["--sla-num-skip-groups", str(self.skip_groups), "--sla-kv-projection", self.kv_projection]
        flags += ["--sla-layers", self.layers] if self.layers is not None else []
        flags += ["--sla-share", self.share] if self.share != "kv" else []
        flags += ["--ffn-hidden-size", str(self.ffn_hidden_size)] if self.ffn_hidden_size is not None else []
        return tuple(flags)

    @property
    def order(self) -> tuple[Any, ...]:
        """Settings in reports: dense first, then by distance, then by source."""
        share = tuple(SHARES).index(self.share)
        coordinates = (self.sources, self.distances, self.skip_groups, share, self.kv_projection)
        return (not self.is_dense, *coordinates, self.layers or "", self.ffn_hidden_size or 0)

    def as_row(self) -> dict[str, Any]:
        """Its part of a run's row; what rows of before have not is there where it says something."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        unsaid = {each.name for each in fields(self) if each.name not in _BEFORE and values[each.name] == each.default}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {name: value for name, value in lists.items() if name not in unsaid}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Self:
        """That of a run's row: what it does not say are the defaults, keys and values at distances."""
        given = {each.name: row[each.name] for each in fields(cls) if each.name in row}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
