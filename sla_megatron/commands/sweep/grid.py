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

from .entries import Model, entries_of, settings_of
from .errors import GridError, SweepError
from .flag_words import Shape, words
from .setting import Setting
from .values import count, known, listed
from .yaml_file import read_yaml

_KEYS = ("presets", "flags", "sizes", "context", "tokens", "seeds", "sla", "dense")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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
        """Those of every run of the same size, context and seed: all but its setting's."""
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
    known(grid, _KEYS, "")
    common = words("flags", {"presets": grid.get("presets", []), "flags": grid.get("flags", [])})
    sizes, contexts = _named("sizes", grid.get("sizes")), _contexts(grid.get("context"))
    tokens = count("tokens", grid.get("tokens"), "a count such as 2_000_000")
    seeds = [count("seeds", seed, "counts of 1 or more") for seed in listed("seeds", grid.get("seeds"))]
    dense, entries = grid.get("dense", True), entries_of(grid.get("sla", []))
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
        model = Model(size, flags, shape)
        settings += [setting for entry in entries for setting in settings_of(*entry, model)]
        for setting in settings:
            own = ("--train-iters", str(iterations), "--seed", str(seed), *setting.flags)
            run = Run(size, setting, seed, (*flags, *own), iterations, shape)
            before = seen.setdefault(run.name, run)
            if before is run:
                yield run
            elif before != run:
                raise SweepError(f"{run.name} comes twice, with other flags: expected sizes and contexts that differ")


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
    counts = [count("context", one, "counts of tokens, or names with flags") for one in listed("context", value)]
    return [("--seq-length", str(one), "--max-position-embeddings", str(one)) for one in counts]
