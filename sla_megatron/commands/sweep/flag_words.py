"""Megatron's flags in a grid: how they are written, which of them are the sweep's own, and what it reads off them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import StartError
from ...common.patterns import attention_layers
from ...common.presets import preset_flags
from .errors import GridError, SweepError

ROOT = Path(__file__).resolve().parents[3]

#: Flags that a grid must not have, and what takes their place.
_NOT_IN_FLAGS = {
    "--train-iters": "tokens, from which iterations follow",
    "--train-samples": "tokens, from which iterations follow",
    "--seed": "seeds",
    "--sla": "sla",
    "--save": "--save-interval alone: a run's checkpoints are in its folder",
    "--load": "--save-interval alone: a run goes on from its own checkpoints",
    "--tensorboard-dir": "none: runs would share it",
    "--rampup-batch-size": "a fixed --global-batch-size, for equal tokens",
    "--step-batch-size-schedule": "a fixed --global-batch-size, for equal tokens",
    "--finetune": "none: a run that goes on would begin anew; weights to begin with are --pretrained-checkpoint",
    "--yaml-cfg": "flags",
    "--multiple-validation-sets": "one validation set, whose loss is compared",
}


def words(key: str, value: Any) -> tuple[str, ...]:
    """Flags as the grid has them under ``key``, one word each.

    Args:
        key: for messages.
        value: a string as in a shell, a list of such, or a mapping with ``presets`` (names as in launch/presets, or
            paths), ``flags``, or both; the flags come last and so win.

    Raises:
        GridError: for what is none of these, or a flag that the sweep sets itself.
        SweepError: for a preset that there is not.
    """
    if isinstance(value, dict):
        unknown = [name for name in value if name not in ("presets", "flags")]
        if unknown or not value:
            raise GridError(key, ", ".join(map(str, unknown)) or "{}", "presets, flags or both")
        names = " ".join(_strings(f"{key}.presets", value.get("presets", [])))
        try:
            presets = preset_flags(names)
        except StartError as error:
            raise SweepError(error.reason) from error
        found = (*presets, *words(f"{key}.flags", value.get("flags", [])))
    else:
        found = ()
        for line in _strings(key, value):
            try:
                found += tuple(shlex.split(line))
            except ValueError as error:
                raise GridError(key, line, f"words as in a shell ({error})") from None
        if found and not found[0].startswith("--"):
            raise GridError(key, found[0], "Megatron's flags, such as --num-layers 8, or {presets: [gpt2-124m]}")
    for word in found:
        name = word.partition("=")[0]
        instead = _NOT_IN_FLAGS.get("--sla" if name.startswith("--sla-") else name)
        if instead is not None:
            raise GridError(key, word, instead)
    return found


def _strings(key: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, str):
            raise GridError(key, each, "a string, or a list of strings")
    return values


@dataclass(frozen=True)
class Shape:
    """What a sweep reads off a run's flags.

    Attributes:
        num_layers: ``L``; of a hybrid model its attention layers.
        num_heads: ``H``.
        num_groups: ``G``, the K/V groups.
        context: tokens a sample.
        global_batch_size: samples a step.
        log_interval: iterations a progress line.
        save_interval: iterations between checkpoints; ``None``: no checkpoints.
    """

    num_layers: int
    num_heads: int
    num_groups: int
    context: int
    global_batch_size: int
    log_interval: int
    save_interval: int | None

    @classmethod
    def of(cls, where: str, flags: Sequence[str]) -> Shape:
        """Of all flags of a run; of a flag that comes twice the later counts, as with Megatron.

        Raises:
            GridError: naming ``where``, the flag that is missing or its value that is no count.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name in ("num-layers", "num-attention-heads", "num-query-groups", "seq-length", "global-batch-size"):
            parser.add_argument(f"--{name}", nargs="?", const="")
        parser.add_argument("--hybrid-layer-pattern", "--hybrid-override-pattern", dest="pattern", nargs="?")
        parser.add_argument("--group-query-attention", action="store_true")
        parser.add_argument("--log-interval", nargs="?", const="", default="100")
        parser.add_argument("--save-interval", nargs="?", const="")
        found, _ = parser.parse_known_args(list(flags))

        def count(name: str) -> int:
            value = getattr(found, name)
            if value is None or not value.isdecimal() or int(value) < 1:
                raise GridError(where, f"--{name.replace('_', '-')} {value or ''}".strip(), "the flag with a count")
            return int(value)

        heads = count("num_attention_heads")
        return cls(
            num_layers=len(attention_layers(found.pattern)) if found.pattern else count("num_layers"),
            num_heads=heads,
            num_groups=count("num_query_groups") if found.group_query_attention else heads,
            context=count("seq_length"),
            global_batch_size=count("global_batch_size"),
            log_interval=count("log_interval"),
            save_interval=None if found.save_interval is None else count("save_interval"),
        )
