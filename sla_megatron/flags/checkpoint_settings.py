"""SLA settings travel with a checkpoint's arguments: taken from there on request, and compared on every load.

Megatron stores the whole argument namespace in each checkpoint.  A weight matrix says nothing of the function it was
trained for, so a run whose settings differ from its checkpoint's would train another model from the same weights.
"""

from __future__ import annotations

import copy
import functools
import io
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from megatron.training import get_args
from megatron.training.checkpointing import load_args_from_checkpoint

from ..attention.sla_config import compact_ranges
from ..common.errors import FlagError, flag_of, one_line_errors
from ..upstream.seams import OneOf, Wrapping, wrap_once
from .gpt_hybrid_load import adopt_layers, load_across_kinds
from .rope_scaling import adopt_rope_scaling, require_same_rope_scaling
from .skipping import SLA_SETTINGS, sla_config_from_args


def adopt_checkpoint_args(args: Namespace) -> None:
    """For ``--use-checkpoint-args``: upstream's arguments as upstream takes them, and of the SLA settings and of the
    scaling of rotary embeddings what the command line leaves open, in place.

    The checkpoint in ``--load`` goes before ``--pretrained-checkpoint``.
    Raises :class:`FlagError` without either, or, as upstream, for local checkpoints.
    """
    if args.load is None and args.pretrained_checkpoint is None:
        raise FlagError("--use-checkpoint-args", True, "--load or --pretrained-checkpoint beside it")
    if args.non_persistent_ckpt_type == "local":
        raise FlagError("--non-persistent-ckpt-type", "local", "another type with --use-checkpoint-args")
    results = [load_args_from_checkpoint(args, load_arg=name) for name in ("pretrained_checkpoint", "load")]
    found = [result[1] for result in results if isinstance(result, tuple)]
    if not found:
        return
    adopt_layers(args, found[-1])
    adopt_rope_scaling(args, found[-1])
    if not getattr(found[-1], "sla", False):
        return
    args.sla = True
    # Two ways to say one thing: what the command line says goes before either of them.
    sources = {"sla_skip_distance", "sla_source_layer"}
    has_source = any(getattr(args, name) is not None for name in sources)
    for name in SLA_SETTINGS:
        if getattr(args, name) is None and not (has_source and name in sources):
            # Checkpoints of before lack some.
            setattr(args, name, getattr(found[-1], name, None))


def require_same_settings(args: Namespace) -> None:
    """Refuse to load a checkpoint of other SLA settings, unless ``--finetune`` changes them on purpose.

    Even then ``--sla-kv-projection pruned`` must match: the weights have other shapes.  Raises :class:`FlagError`.
    """
    load_arg, may_change = "load", args.finetune
    saved = _saved_args(args, load_arg)
    if saved is None:
        # Megatron treats --pretrained-checkpoint as the start of a new run, as with --finetune.
        load_arg, may_change = "pretrained_checkpoint", True
        saved = _saved_args(args, load_arg)
    if saved is not None:
        load_across_kinds(args, saved, load_arg)
        _refuse_others(args, saved, may_change)


def _refuse_others(args: Namespace, saved: Namespace, may_change: bool) -> None:
    """Raise :class:`FlagError` where the settings of ``saved``, a checkpoint's arguments, are not those of ``args``."""
    require_same_rope_scaling(args, saved, may_change)
    ours, theirs = _settings(args), _settings(saved)
    changed = [flag for flag in ours if ours[flag] != theirs[flag]]
    if not changed:
        return
    if not may_change:
        flag = changed[0]
        raise FlagError(
            flag,
            ours[flag],
            f"{theirs[flag]} as in the checkpoint that is loaded (or --finetune, to change it on purpose)",
        )
    if "pruned" in (ours["--sla-kv-projection"], theirs["--sla-kv-projection"]):
        flag = "--sla-kv-projection" if "--sla-kv-projection" in changed else changed[0]
        raise FlagError(flag, ours[flag], f"{theirs[flag]} as in the checkpoint: pruned weights fit no other settings")


def _settings(args: Namespace) -> dict[str, Any]:
    """Flag -> value, comparable between runs: layers are spelled out, and all are ``off`` without ``--sla``."""
    sla = sla_config_from_args(args)
    if sla is None:
        return {"--sla": "off", **{flag_of(name): "off" for name in SLA_SETTINGS}}
    return {
        "--sla": "on",
        "--sla-skip-distance": " ".join(map(str, sla.skip_distances)) or "none",
        "--sla-source-layer": " ".join(map(str, sla.source_layers)) or "none",
        "--sla-num-skip-groups": str(sla.num_skip_groups),
        "--sla-layers": compact_ranges(sla.consumer_layers) or "none",
        "--sla-share": sla.share,
        "--sla-kv-projection": sla.kv_projection,
    }


def _saved_args(args: Namespace, load_arg: str) -> Namespace | None:
    """The arguments stored in the checkpoint that ``args.<load_arg>`` points to; ``None`` where there is none yet.

    Non-persistent ones in ``--load`` count too, if they are newer; which local ones there are, the ranks find out
    together, later (:data:`CHECKED_ON_LOADING`).
    """
    if getattr(args, load_arg, None) is None or args.non_persistent_ckpt_type == "local":
        return None
    # Upstream's reader also overwrites the arguments it is given, and prints each: a copy, and silence.
    with redirect_stdout(io.StringIO()):
        result = load_args_from_checkpoint(copy.copy(args), load_arg=load_arg)
    return result[1] if isinstance(result, tuple) else None


def _checked_on_loading(check: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(check)
    def checked(checkpoint_args: Namespace, *args: Any, **kwargs: Any) -> None:
        # All ranks are here, with equal arguments, and nothing was loaded yet.
        with one_line_errors():
            _refuse_others(get_args(), checkpoint_args, may_change=False)
        check(checkpoint_args, *args, **kwargs)

    return checked


_CHECKED_ON_LOADING = (
    "megatron.training.checkpointing:check_checkpoint_args",
    "called with a checkpoint's arguments before its weights are used; compares the SLA settings too",
)

#: The only place that sees what a local checkpoint, one on each node's own disk, was trained with.  Upstream's #5792,
#: which dev lacks, has it leave arguments out.
CHECKED_ON_LOADING = OneOf(
    *(
        Wrapping(*_CHECKED_ON_LOADING, parameters, wrap=_checked_on_loading)
        for parameters in (("checkpoint_args", "skip_args"), ("checkpoint_args",))
    )
)


def check_settings_on_loading(args: Namespace) -> None:
    """With ``--non-persistent-ckpt-type local`` have settings compared where the checkpoint is chosen and loaded."""
    if args.non_persistent_ckpt_type == "local":
        wrap_once([CHECKED_ON_LOADING])
