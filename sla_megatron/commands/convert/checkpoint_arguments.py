"""The arguments that Megatron stored in a checkpoint, read without Megatron where that is enough.

Importing it takes most of the time that a small conversion has.  What an export needs is in the checkpoint; its types
alone are Megatron's, and the defaults of arguments that an older version did not have.
"""

from __future__ import annotations

import json
import pickle
from argparse import ArgumentParser, Namespace
from collections import OrderedDict
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path, PosixPath
from signal import Signals
from types import SimpleNamespace
from typing import IO, Any
from warnings import catch_warnings

import torch
from torch.distributed.checkpoint import CheckpointException

from ...common.checkpoint_folders import common_state
from ...common.errors import last_line
from ...flags.sla_flags import add_sla_args
from .errors import ConvertError
from .model_arguments import MAPPED
from .stored_arguments import completed, megatron_defaults, names, renamed
from .stored_items import UnfamiliarError

#: Where Megatron's enumerations are, members of which are among its arguments.
_ENUMERATIONS = "megatron.core.transformer.enums"

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, Signals, PosixPath)

# Mapped, and in no checkpoint of today: names of earlier versions, or what a run of ours adds.
_MAY_LACK = frozenset(("hybrid_override_pattern", "is_hybrid_model", "rope_scaling_factor_honoured"))


class Member:
    """A member of an enumeration of Megatron's, whose import takes seconds: ``enumeration`` names it.

    Attributes:
        value: the member's.
    """

    enumeration = ""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"{self.enumeration.rpartition('.')[2]}({self.value})"


class Unknown:
    """In place of an object of a class that is not known here: whatever it was given is dropped."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = __init__


class SettingsUnpickler(pickle.Unpickler):
    """Makes namespaces, dtypes and what Python has itself; in place of anything else are stand-ins, and none is called.

    Those of Megatron's enumerations are :class:`Member`, of the rest, tensors too, :class:`Unknown`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._known: dict[tuple[str, str], Any] = {
            ("argparse", "Namespace"): Namespace,
            ("types", "SimpleNamespace"): SimpleNamespace,
            ("collections", "OrderedDict"): OrderedDict,
            ("pathlib", "PosixPath"): PosixPath,
            ("signal", "Signals"): Signals,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module == _ENUMERATIONS and name.isidentifier():
            # Kept, so that all members of one are of one class.
            return self._known.setdefault((module, name), type(name, (Member,), {"enumeration": f"{module}.{name}"}))
        return Unknown

    def persistent_load(self, pid: Any) -> Any:
        """A tensor's storage."""
        return Unknown()


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
    try:
        state = common_state(folder, SettingsUnpickler)
    except Exception as error:  # Of damaged pickles anything comes.
        raise UnfamiliarError(repr(error)) from error
    args = state.get("args") if isinstance(state, dict) else None
    if not isinstance(args, Namespace) or not _is_known(vars(args)):
        raise UnfamiliarError("other types")
    return args


def _is_known(value: Any) -> bool:
    """Whether ``value`` is as Megatron would read it once it is :func:`_resolved`."""
    if type(value) in (dict, list, tuple):
        return all(map(_is_known, value.values() if isinstance(value, dict) else value))
    return type(value) in _PLAIN or isinstance(value, Member)
