"""Rows as statistics: mean and spread over seeds, and the difference to the dense run of the same seed.  No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .setting import Setting

Row = dict[str, Any]
#: What runs that differ in their seed alone have in common.
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Spread:
    """Of ``n`` values; ``deviation`` is the sample's (n - 1), ``None`` of one value."""

    n: int
    mean: float
    least: float
    most: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """``None`` of no values."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(len(values), statistics.fmean(values), min(values), max(values), deviation)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        size, context: of model and batch; ``context`` in tokens.
        setting: skip-layer attention; its label is that of the rows that were given one.
        num_layers, num_heads, num_groups: of the model.
        seeds: ascending.
        tokens: of each run.
        parameters: of each run.
        dense_parameters: of the dense run that it is compared with; ``None`` without one, and of dense runs.
        validation_loss, training_loss: in nats a token.
        perplexity: of the validation set.
        differences: seed -> validation loss less that of the dense run of the same size, context and seed, for seeds
            that have both; none of dense runs.
        difference: over them; ``None`` without one.
        tokens_per_second: the median over seeds.
    """

    size: str
    context: int
    setting: Setting
    num_layers: int
    num_heads: int
    num_groups: int
    seeds: tuple[int, ...]
    tokens: int
    parameters: int
    dense_parameters: int | None
    validation_loss: Spread
    training_loss: Spread
    perplexity: Spread
    differences: dict[int, float]
    difference: Spread | None
    tokens_per_second: float

    @property
    def is_dense(self) -> bool:
        return self.setting.is_dense

    @property
    def distance(self) -> str:
        """What skip groups read: ``6`` layers back, ``2+4`` for several distances, or ``layer 1``, ``layer 1+4``."""
        several = "+".join(map(str, self.setting.distances or self.setting.sources))
        return f"layer {several}" if self.setting.sources else several

    @property
    def skip_heads(self) -> int:
        """Query heads that skip."""
        return self.setting.skip_groups * self.num_heads // self.num_groups

    @property
    def variant(self) -> str:
        """What sets it apart beside distance and groups: its name, tensors, layers, projections, the MLP's width."""
        setting = self.setting
        parts = [setting.label] if setting.label else []
        parts += [f"{setting.share} alone"] if setting.share != "kv" else []
        parts += [f"layers {setting.layers}"] if setting.layers else []
        parts += [setting.kv_projection] if setting.kv_projection != "full" else []
        parts += [f"MLP {setting.ffn_hidden_size}"] if setting.ffn_hidden_size else []
        return ", ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """All of it, for a program."""
        found = asdict(self)
        return found | found.pop("setting")


def groups(rows: Sequence[Row]) -> list[Group]:
    """A group for each size, context and setting; each dense one before what is compared with it."""
    by_key: dict[Key, list[Row]] = {}
    for row in rows:
        by_key.setdefault(_key(row), []).append(row)
    dense = {(row["size"], row["context"], row["seed"]): row for row in rows if Setting.of_row(row).is_dense}
    found = [_group(sorted(same, key=lambda row: row["seed"]), dense) for same in by_key.values()]
    return sorted(found, key=lambda g: (g.size, g.context, *g.setting.order))


def _key(row: Row) -> Key:
    return (row["size"], row["context"], Setting.of_row(row))


def _group(rows: Sequence[Row], dense: dict[tuple[str, int, int], Row]) -> Group:
    first, labels = rows[0], [row["label"] for row in rows if row.get("label")]
    setting = replace(Setting.of_row(first), label=labels[0] if labels else None)

    def spread(what: str) -> Spread:
        return Spread.of([row[what] for row in rows])

    compared = [] if setting.is_dense else rows
    found = [(row, dense.get((row["size"], row["context"], row["seed"]))) for row in compared]
    pairs = [(row, other) for row, other in found if other is not None]
    differences = {row["seed"]: row["validation_loss"] - other["validation_loss"] for row, other in pairs}
    return Group(
        size=first["size"],
        context=first["context"],
        setting=setting,
        num_layers=first["num_layers"],
        num_heads=first["num_heads"],
        num_groups=first["num_groups"],
        seeds=tuple(row["seed"] for row in rows),
        tokens=first["tokens"],
        parameters=first["parameters"],
        dense_parameters=pairs[0][1]["parameters"] if pairs else None,
        validation_loss=spread("validation_loss"),
        training_loss=spread("training_loss"),
        perplexity=spread("perplexity"),
        differences=differences,
        difference=Spread.of(list(differences.values())),
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in rows),
    )
