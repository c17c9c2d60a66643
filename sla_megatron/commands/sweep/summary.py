"""Rows as statistics: mean and spread over seeds, and the difference to the dense run of the same seed.  No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
        distances, skip_groups, kv_projection, layers: the setting; no distances: dense.
        num_layers, num_heads, num_groups: of the model.
        seeds: ascending.
        tokens: of each run.
        parameters: of each run.
        validation_loss, training_loss: in nats a token.
        perplexity: of the validation set.
        difference: validation loss less that of the dense run of the same size, context and seed, over the seeds that
            have both; ``None`` without one, and of dense runs.
        tokens_per_second: the median over seeds.
    """

    size: str
    context: int
    distances: tuple[int, ...]
    skip_groups: int
    kv_projection: str
    layers: str | None
    num_layers: int
    num_heads: int
    num_groups: int
    seeds: tuple[int, ...]
    tokens: int
    parameters: int
    validation_loss: Spread
    training_loss: Spread
    perplexity: Spread
    difference: Spread | None
    tokens_per_second: float

    @property
    def is_dense(self) -> bool:
        return not self.distances

    @property
    def distance(self) -> str:
        """``6``, or ``2+4`` for several."""
        return "+".join(map(str, self.distances))

    @property
    def skip_heads(self) -> int:
        """Query heads that skip."""
        return self.skip_groups * self.num_heads // self.num_groups

    @property
    def variant(self) -> str:
        """What sets it apart beside distance and groups: layers, projections."""
        parts = [f"layers {self.layers}"] if self.layers else []
        return ", ".join([*parts, *([self.kv_projection] if self.kv_projection != "full" else [])])

    def as_json(self) -> dict[str, Any]:
        """All of it, for a program."""
        return asdict(self)


def groups(rows: Sequence[Row]) -> list[Group]:
    """A group for each size, context and setting; each dense one before what is compared with it."""
    by_key: dict[Key, list[Row]] = {}
    for row in rows:
        by_key.setdefault(_key(row), []).append(row)
    dense = {(row["size"], row["context"], row["seed"]): row for row in rows if not row["distances"]}
    found = [_group(sorted(same, key=lambda row: row["seed"]), dense) for same in by_key.values()]
    return sorted(found, key=lambda g: (g.size, g.context, g.distances, g.skip_groups, g.kv_projection, g.layers or ""))


def _key(row: Row) -> Key:
    setting = (tuple(row["distances"]), row["skip_groups"], row["kv_projection"], row["layers"])
    return (row["size"], row["context"], *setting)


def _group(rows: Sequence[Row], dense: dict[tuple[str, int, int], Row]) -> Group:
    first = rows[0]

    def spread(what: str) -> Spread:
        return Spread.of([row[what] for row in rows])

    pairs = [(row, dense.get((row["size"], row["context"], row["seed"]))) for row in rows if row["distances"]]
    differences = [row["validation_loss"] - other["validation_loss"] for row, other in pairs if other is not None]
    return Group(
        size=first["size"],
        context=first["context"],
        distances=tuple(first["distances"]),
        skip_groups=first["skip_groups"],
        kv_projection=first["kv_projection"],
        layers=first["layers"],
        num_layers=first["num_layers"],
        num_heads=first["num_heads"],
        num_groups=first["num_groups"],
        seeds=tuple(row["seed"] for row in rows),
        tokens=first["tokens"],
        parameters=first["parameters"],
        validation_loss=spread("validation_loss"),
        training_loss=spread("training_loss"),
        perplexity=spread("perplexity"),
        difference=Spread.of(differences),
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in rows),
    )
