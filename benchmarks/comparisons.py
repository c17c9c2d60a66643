"""Settings of sweeps against dense runs, pair by pair: a pair is a text and a seed, and may lie in several files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sla_megatron.attention.sla_config import DEFAULT_SHARE, of_share
from sla_megatron.commands.sweep.setting import Setting
from sla_megatron.commands.sweep.summary import Group, groups

from .paired import Difference, difference

#: What all texts of a comparison together are called.
BOTH = "all texts"

Result = dict[str, Any]
#: Size (of a grid whose sizes are texts, the text) and seed.
Pair = tuple[str, int]


@dataclass(frozen=True)
class Comparison:
    """Differences of validation losses, a value a pair, in nats a token; ``what`` of ``where``, as tables say it."""

    where: str
    what: str
    values: dict[Pair, float]

    @property
    def difference(self) -> Difference:
        return difference(list(self.values.values()))

    def less(self, other: Comparison, what: str) -> Comparison | None:
        """Pair by pair this one's values less ``other``'s; ``None`` where they have no pair in common."""
        shared = [pair for pair in self.values if pair in other.values]
        values = {pair: self.values[pair] - other.values[pair] for pair in shared}
        return Comparison(self.where, what, values) if values else None


@dataclass(frozen=True)
class Against:
    """A setting at one context, over the texts of a sweep.

    Attributes:
        setting: its coordinates.
        context: in tokens.
        num_layers: of the model.
        texts: text -> what it is against dense there.
        group: of one of the texts.
    """

    setting: Setting
    context: int
    num_layers: int
    texts: dict[str, Comparison]
    group: Group

    @property
    def label(self) -> str:
        return label_of(self.group)

    @property
    def together(self) -> Comparison:
        """Over all texts."""
        return pooled(self.texts.values(), self.label)

    @property
    def all(self) -> list[Comparison]:
        """Each text, and where there are several, all together."""
        return [*self.texts.values(), *([self.together] if len(self.texts) > 1 else [])]

    @property
    def is_default(self) -> bool:
        """Whether it is the paper's best: three quarters of the layers and of the heads."""
        return self._is((of_share(DEFAULT_SHARE, self.num_layers),), None)

    @property
    def is_other_reading(self) -> bool:
        """As many layers as the default's distance, each of which reads the one before it."""
        first = self.num_layers - of_share(DEFAULT_SHARE, self.num_layers) + 1
        return self._is((1,), f"{first}-{self.num_layers}")

    def _is(self, distances: tuple[int, ...], layers: str | None) -> bool:
        skip_groups = of_share(DEFAULT_SHARE, self.group.num_groups)
        return self.setting == Setting(distances, skip_groups, layers=layers)


def label_of(group: Group) -> str:
    """``dense``, ``distance 6, 6 of 8 heads``, or what a setting with a name is called."""
    if group.is_dense:
        return "dense"
    if group.setting.label:
        return group.variant
    read = f"distance {group.distance}" if group.setting.distances else group.distance
    return ", ".join(filter(None, (read, f"{group.skip_heads} of {group.num_heads} heads", group.variant)))


def pooled(comparisons: Iterable[Comparison], what: str) -> Comparison:
    """All pairs of several texts as pairs of one comparison."""
    found = list(comparisons)
    where = BOTH if len(found) > 1 else found[0].where
    return Comparison(where, what, {pair: value for each in found for pair, value in each.values.items()})


def against_dense(result: Result | None) -> list[Against]:
    """Every setting of a sweep's result that has a dense run to be compared with; none without a result."""
    found: dict[tuple[int, Setting], list[Group]] = {}
    for group in groups(result["rows"]) if result else []:
        if group.differences:
            found.setdefault((group.context, group.setting), []).append(group)
    return [_against(context, setting, several) for (context, setting), several in found.items()]


def _against(context: int, setting: Setting, several: Sequence[Group]) -> Against:
    texts = {
        group.size: Comparison(
            group.size, label_of(group), {(group.size, seed): value for seed, value in group.differences.items()}
        )
        for group in several
    }
    return Against(setting, context, several[0].num_layers, texts, several[0])


def holm(p_values: Sequence[float], level: float = 0.05) -> int:
    """How many stay below ``level`` by Holm's step-down correction for so many tests, dependent ones too."""
    for rank, p in enumerate(sorted(p_values)):
        if p > level / (len(p_values) - rank):
            return rank
    return len(p_values)
