"""The arguments that Megatron stored in a checkpoint, read without Megatron where that is enough.

Importing it takes most of the time that a small conversion has.  What an export needs is in the checkpoint; its types
alone are Megatron's, and the defaults of arguments that an older version did not have.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path, PosixPath
from signal import Signals
from typing import Any
from warnings import catch_warnings

import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from ...common.errors import last_line
from ...flags.sla_flags import add_sla_args
from .errors import ConvertError
from .model_arguments import MAPPED
from .stored_arguments import completed, megatron_defaults, names, renamed
from .stored_items import Member, UnfamiliarError, read_settings

#: The key of what is no tensor, and the file in which it was before.
_COMMON, _COMMON_FILE = "common_state/shard_0_1", "common.pt"

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, Signals, PosixPath)

# Mapped, and in no checkpoint of today: names of earlier versions, or what a run of ours adds.
_MAY_LACK = frozenset(("hybrid_override_pattern", "is_hybrid_model", "rope_scaling_factor_honoured"))


def export_args(folder: Path) -> Namespace:
    """The arguments of a checkpoint, as far as an export needs them: :func:`whole` of them has all.

    Raises:
        ConvertError: if there are none that can be read.
    """
    try:
        given = renamed(_without_megatron(folder))
    except (UnfamiliarError, OSError, ValueError):
        return stored_args(folder)
    ours = vars(add_sla_args(ArgumentParser(allow_abbrev=False)).parse_args([]))
    if set(names(MAPPED)) - _MAY_LACK - set(given) - set(ours):
        # An older version's: Megatron's parser knows what it did.
        return stored_args(folder)
    return completed(Namespace(**given), ours)


def stored_args(folder: Path) -> Namespace:
    """All arguments of a checkpoint, with those that it had none of at Megatron's defaults.  Likewise."""
    from ...cpu.device import megatron_device

    # Megatron's modules warn of what this machine lacks.
    with catch_warnings(action="ignore"), redirect_stdout(StringIO()), megatron_device(["--device", "cpu"]):
        # Importing it registers the types that the arguments hold.
        import megatron.training.checkpointing  # noqa: F401
        from megatron.core import dist_checkpointing

        try:
            state = dist_checkpointing.load_common_state_dict(str(folder))
        except (Exception, CheckpointException) as error:
            raise ConvertError(f"{folder}: its arguments cannot be read: {last_line(error)}") from error
    if "args" not in state:
        raise ConvertError(f"{folder} holds no arguments of Megatron's trainer")
    return completed(state["args"])


def whole(args: Namespace) -> Namespace:
    """What :func:`export_args` left out too: values of Megatron's types, and the defaults of what is not stored."""
    # It imports Megatron such that it can be, on a CPU too.
    megatron_defaults()
    return completed(Namespace(**{name: _resolved(value) for name, value in vars(args).items()}))


def _resolved(value: Any) -> Any:
    if isinstance(value, Member):
        module, _, name = value.enumeration.rpartition(".")
        return getattr(import_module(module), name)(value.value)
    if isinstance(value, list | tuple):
        return type(value)(map(_resolved, value))
    return {key: _resolved(each) for key, each in value.items()} if type(value) is dict else value


def _without_megatron(folder: Path) -> Namespace:
    """The arguments as they are stored.  Raises ``UnfamiliarError`` where they hold more than is known here."""
    if json.loads((folder / "metadata.json").read_text()).get("sharded_backend") != "torch_dist":
        raise UnfamiliarError(folder)
    if (folder / _COMMON_FILE).exists():
        state = read_settings(folder / _COMMON_FILE)
    else:
        state = _common_state(folder)
    args = state.get("args") if isinstance(state, dict) else None
    if not isinstance(args, Namespace) or not _is_known(vars(args)):
        raise UnfamiliarError("other types")
    return args


def _is_known(value: Any) -> bool:
    """Whether ``value`` is as Megatron would read it once it is :func:`_resolved`."""
    if type(value) in (dict, list, tuple):
        return all(map(_is_known, value.values() if isinstance(value, dict) else value))
    return type(value) in _PLAIN or isinstance(value, Member)


def _common_state(folder: Path) -> Any:
    try:
        metadata: Metadata = FileSystemReader(folder).read_metadata()
        where = metadata.storage_data[MetadataIndex(_COMMON)]
    except Exception as error:  # Of damaged pickles anything comes.
        raise UnfamiliarError(repr(error)) from error
    if getattr(where, "transform_descriptors", None):
        raise UnfamiliarError("transformed")
    found = read_settings(folder / where.relative_path, where.offset, where.length)
    return found[0] if isinstance(found, list) and len(found) == 1 else None
