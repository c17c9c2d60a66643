"""A grid's file as a list of runs: every size, context and seed, dense and with each setting of skip-layer attention.

Pure Python and YAML, no torch; docs/sweep.md describes the file.  Paper: arXiv 2406.11274.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...attention.sla_config import DEFAULT_SHARE, KV_PROJECTIONS
from .errors import GridError, SweepError
from .flag_words import Shape, words
from .yaml_file import read_yaml

_KEYS = ("presets", "flags", "sizes", "context", "tokens", "seeds", "sla", "dense")
_SLA_KEYS = ("distance", "distances", "skip-groups", "kv-projection", "layers")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_SHARE = "a count of 1 or more, or a share such as 0.75"


@dataclass(frozen=True)
class Setting:
    """Skip-layer attention of a run; no distances: dense."""

    distances: tuple[int, ...] = ()
    skip_groups: int = 0
    kv_projection: str = "full"
    layers: str | None = None

    @property
    def name(self) -> str:
        """``dense``, ``n6-k6``, ``n2+4-k4-in5_7-8-pruned``."""
        if not self.distances:
            return "dense"
        parts = [f"n{'+'.join(map(str, self.distances))}", f"k{self.skip_groups}"]
        if self.layers is not None:
            parts.append("in" + self.layers.replace(",", "_"))
        if self.kv_projection != "full":
            parts.append(self.kv_projection)
        return "-".join(parts)

    @property
    def flags(self) -> tuple[str, ...]:
        """The ``--sla`` flags; none of a dense run."""
        if not self.distances:
            return ()
        flags = ["--sla", "--sla-skip-distance", *map(str, self.distances)]
        flags += ["--sla-num-skip-groups", str(self.skip_groups), "--sla-kv-projection", self.kv_projection]
        return (*flags, *(("--sla-layers", self.layers) if self.layers is not None else ()))


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        size: the model's name in the grid.
        setting: skip-layer attention.
        seed: of the weights, the order of the data and dropout.
        flags: of Megatron, all but where it saves.
        iterations: the fewest steps with the grid's tokens.
        shape: of model and batch.
    """

    size: str
    setting: Setting
    seed: int
    flags: tuple[str, ...]
    iterations: int
    shape: Shape = field(repr=False)

    @property
    def name(self) -> str:
        """Names the run's folder: ``h256-l8-c512-n6-k6-s1``."""
        return f"{self.size}-c{self.shape.context}-{self.setting.name}-s{self.seed}"

    @property
    def dense_flags(self) -> tuple[str, ...]:
        """Those of every run of the same size, context and seed: all but ``--sla``."""
        return self.flags[: len(self.flags) - len(self.setting.flags)]

    @property
    def tokens(self) -> int:
        """That it trains on."""
        return self.iterations * self.shape.global_batch_size * self.shape.context


def read_grid(path: Path, more_flags: Sequence[str] = ()) -> list[Run]:
    """The runs of the file ``path``, all of the first seed first; settings that round to the same are one run.

    Args:
        path: YAML.
        more_flags: for all runs, behind those of the file, such as ``--device cpu``.

    Raises:
        SweepError: one line with file, key, value and what is accepted.
    """
    grid = read_yaml(path)
    try:
        return list(_runs(grid, tuple(more_flags)))
    except SweepError as error:
        raise SweepError(f"{path}: {error}") from error


def _runs(grid: dict[str, Any], more_flags: tuple[str, ...]) -> Iterator[Run]:
    _known(grid, _KEYS, "")
    common = words("flags", {"presets": grid.get("presets", []), "flags": grid.get("flags", [])})
    sizes, contexts = _named("sizes", grid.get("sizes")), _contexts(grid.get("context"))
    tokens = _count("tokens", grid.get("tokens"), "a count such as 2_000_000")
    seeds = [_count("seeds", seed, "counts of 1 or more") for seed in _list("seeds", grid.get("seeds"))]
    dense, entries = grid.get("dense", True), _sla_entries(grid.get("sla", []))
    if not isinstance(dense, bool):
        raise GridError("dense", dense, "true or false")
    if not dense and not entries:
        raise GridError("sla", None, "settings, where dense is false")
    seen: dict[str, Run] = {}
    for seed, (size, of_size), of_context in itertools.product(seeds, sizes.items(), contexts):
        flags = (*common, *of_size, *of_context, *more_flags)
        shape = Shape.of(f"size {size}", flags)
        iterations = -(-tokens // (shape.global_batch_size * shape.context))
        settings = [Setting()] if dense else []
        settings += [setting for entry in entries for setting in _settings(*entry, size, shape)]
        for setting in settings:
            own = ("--train-iters", str(iterations), "--seed", str(seed), *setting.flags)
            run = Run(size, setting, seed, (*flags, *own), iterations, shape)
            before = seen.setdefault(run.name, run)
            if before is run:
                yield run
            elif before != run:
                raise SweepError(f"{run.name} comes twice, with other flags: expected sizes and contexts that differ")


def _sla_entries(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """Each entry of ``sla`` with its key."""
    if value == []:
        return []
    found = []
    for number, entry in enumerate(_list("sla", value)):
        if not isinstance(entry, dict):
            raise GridError(f"sla[{number}]", entry, f"a mapping of {', '.join(_SLA_KEYS)}")
        _known(entry, _SLA_KEYS, f"sla[{number}].")
        if "distance" in entry and "distances" in entry:
            raise GridError(f"sla[{number}].distances", entry["distances"], "no distance beside it")
        found.append((f"sla[{number}]", entry))
    return found


def _settings(key: str, entry: dict[str, Any], size: str, shape: Shape) -> Iterator[Setting]:
    """One entry's, for a size: the product of its lists."""
    if "distances" in entry:
        name, given = "distances", _list(f"{key}.distances", entry["distances"])
        if not all(isinstance(several, list) and several for several in given):
            raise GridError(f"{key}.distances", given, "a list of lists, such as [[2, 4]]")
    else:
        name, given = "distance", [[one] for one in _list(f"{key}.distance", entry.get("distance", DEFAULT_SHARE))]
    distances = [tuple(_share(f"{key}.{name}", one, shape.num_layers) for one in several) for several in given]
    groups = [
        _share(f"{key}.skip-groups", one, shape.num_groups)
        for one in _list(f"{key}.skip-groups", entry.get("skip-groups", DEFAULT_SHARE))
    ]
    for count in groups:
        if count > shape.num_groups:
            raise GridError(f"{key}.skip-groups", count, f"at most {shape.num_groups}, the K/V groups of size {size}")
    projections = _list(f"{key}.kv-projection", entry.get("kv-projection", KV_PROJECTIONS[0]))
    for projection in projections:
        if projection not in KV_PROJECTIONS:
            raise GridError(f"{key}.kv-projection", projection, " or ".join(KV_PROJECTIONS))
    ranges = _list(f"{key}.layers", entry["layers"]) if "layers" in entry else [None]
    layers = [None if one is None else str(one).replace(" ", "") for one in ranges]
    for one, text in zip(ranges, layers, strict=True):
        if text is not None and not _RANGES.fullmatch(text):
            raise GridError(f"{key}.layers", one, "layers such as 5-8 or 4,6,8-12")
    for setting in itertools.product(distances, groups, projections, layers):
        yield Setting(*setting)


def _share(key: str, value: Any, whole: int) -> int:
    """A count as it is, a share of ``whole`` rounded as the flags' defaults are, and at least 1."""
    if isinstance(value, float) and 0 < value <= 1:
        return max(1, round(value * whole))
    return _count(key, value, _SHARE)


def _count(key: str, value: Any, accepted: str) -> int:
    if isinstance(value, float) and value.is_integer() and value > 1:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise GridError(key, value, accepted)
    return value


def _list(key: str, value: Any) -> list[Any]:
    """``value``, or a list of it alone; none twice."""
    values = value if isinstance(value, list) else [value]
    if value is None or not values:
        raise GridError(key, None, "a value, or a list of them")
    for one in values:
        if values.count(one) > 1:
            raise GridError(key, values, f"{one} once")
    return values


def _named(key: str, value: Any) -> dict[str, tuple[str, ...]]:
    """Name -> flags."""
    if not isinstance(value, dict) or not value:
        raise GridError(key, value, "a mapping of names to flags")
    for name in value:
        if not _NAME.fullmatch(str(name)):
            raise GridError(key, name, "a name of letters, digits, '.', '_' and '-', which names folders")
    return {str(name): words(f"{key}.{name}", flags) for name, flags in value.items()}


def _contexts(value: Any) -> list[tuple[str, ...]]:
    """The flags of each context: of a count, or as they are given under a name."""
    if isinstance(value, dict):
        return list(_named("context", value).values())
    counts = [_count("context", one, "counts of tokens, or names with flags") for one in _list("context", value)]
    return [("--seq-length", str(one), "--max-position-embeddings", str(one)) for one in counts]


def _known(mapping: dict[str, Any], keys: Sequence[str], prefix: str) -> None:
    for key in mapping:
        if key not in keys:
            raise GridError(f"{prefix}{key}", mapping[key], f"one of the keys {', '.join(keys)}")
