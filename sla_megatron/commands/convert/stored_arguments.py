"""The arguments that a checkpoint stores, against those that Megatron has: an export refuses what it does not know.

A checkpoint holds all of Megatron's arguments, and whatever else a patched or another version added.  Each that is not
at the default of Megatron's own parser is mapped, known not to matter, or named as the reason why there is no export.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Mapping
from functools import cache
from typing import Any

from ...common.errors import flag_of
from ...flags import rope_scaling
from .errors import ConvertError
from .harmless_arguments import HARMLESS
from .model_arguments import FINE, MAPPED, ONLY_WITH, REFUSED

# Names of earlier versions, and today's.
_RENAMED = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}

# Longer values are cut in a message.
_SHOWN = 60


def names(text: str) -> tuple[str, ...]:
    """The names of one row of the tables."""
    return tuple(text.split())


@cache
def megatron_defaults() -> Mapping[str, Any]:
    """What Megatron's parser, with our flags, makes of an empty command line: name -> value."""
    from ...cpu.device import megatron_device

    with megatron_device(["--device", "cpu"]):
        from megatron.training.arguments import add_megatron_arguments

        from ...flags.sla_flags import add_sla_args

        # argparse takes part of a flag's name for the whole, unless it is told not to; there is nothing to take here.
        parser = argparse.ArgumentParser(allow_abbrev=False)
        add_sla_args(add_megatron_arguments(parser))
        return vars(parser.parse_args([]))


def renamed(stored: Namespace) -> dict[str, Any]:
    """``stored`` under today's names."""
    given = dict(vars(stored))
    for old, new in _RENAMED.items():
        if old in given and new not in given:
            given[new] = given.pop(old)
    return given


def completed(stored: Namespace, defaults: Mapping[str, Any] | None = None) -> Namespace:
    """``stored`` under today's names, with Megatron's default for what the version that wrote them did not have.

    Args:
        stored: what a checkpoint holds.
        defaults: in place of Megatron's, where the others are not needed.
    """
    known = megatron_defaults() if defaults is None else defaults
    args = Namespace(**{**known, rope_scaling.HONOURED: False, **renamed(stored)})
    # As Megatron's validation does.  Checkpoints from before --position-embedding-type say so in this way alone.
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    args.num_experts = args.num_experts or None
    return args


def require_understood(args: Namespace) -> None:
    """Refuse arguments that may change what the model computes and that are not mapped.

    Raises:
        ConvertError: which names all of them.
    """
    changed = {name: value for name, value in sorted(vars(args).items()) if _may_matter(name, value)}
    refused = [name for name in changed if name in REFUSED]
    if refused:
        one = len(refused) == 1
        what = f"it, which changes {REFUSED[refused[0]]}" if one else "them"
        raise ConvertError(f"{_shown(changed, refused)}: the Hugging Face format has no field for {what}")
    if changed:
        raise ConvertError(
            f"{_shown(changed, list(changed))}: no argument that this version knows, so that it may change the model; "
            f"--override {next(iter(changed))}=None says that it does not"
        )


def _may_matter(name: str, value: Any) -> bool:
    if name in _known() or _is_off(value) or value in FINE.get(name, ()):
        return False
    # Importing Megatron for them takes seconds, and few arguments come to this.
    defaults = megatron_defaults()
    return name not in defaults or value != defaults[name]


@cache
def _known() -> frozenset[str]:
    """Names whose values are mapped or do not matter."""
    rows = (MAPPED, *HARMLESS.values(), *ONLY_WITH.values())
    return frozenset(name for row in rows for name in names(row))


def _is_off(value: Any) -> bool:
    try:
        return not value
    except (TypeError, ValueError, RuntimeError):
        # An array, whose truth is not one.
        return False


def _shown(values: Mapping[str, Any], chosen: list[str]) -> str:
    texts = [f"{flag_of(name)} {values[name]}" for name in chosen]
    return ", ".join(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..." for text in texts)
