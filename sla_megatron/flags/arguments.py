"""Megatron's flags with ``--sla``: parsed, validated and filled in, or refused in one line.

A script that calls Megatron's ``parse_and_validate_args`` calls the one here instead; nothing else changes.  The
commands settle the flags of a run with the same function.
"""

from __future__ import annotations

import re
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

from megatron.training import arguments as upstream
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.global_vars import set_global_variables

from ..common.errors import FlagError, StartError, flag_of, one_line_errors
from ..common.flag_types import refusal
from ..common.silence import silence
from ..cpu.backend import another_machine, cpu_backend_is_active
from ..cpu.flags import fit_to_cpu
from ..upstream.megatron_version import require_megatron
from ..upstream.seams import Reliance
from . import hybrid
from .checkpoint_settings import adopt_checkpoint_args, check_settings_on_loading, require_same_settings
from .core_attention import resolve_core_attention
from .entry_point import refuse_unhonoured
from .sla_flags import add_sla_args
from .validation import refuse_unsupported, resolve_sla_args

ArgumentsProvider = Callable[[ArgumentParser], ArgumentParser]

PARSING = Reliance(
    "megatron.training.arguments:parse_and_validate_args",
    "its steps are spelled out here, to settle the --sla flags between two of them",
    ("extra_args_provider", "ignore_unknown_args", "args_defaults"),
    # They differ in where a line ends.
    sources={"c2bc7af545b664d3": "0.19.0 to 0.19.2, and main at d98e8a64", "7299fd0582632c1f": "dev at d48bd6be"},
)


def parse_and_validate_args(
    extra_args_provider: ArgumentsProvider | None = None,
    ignore_unknown_args: bool = False,
    args_defaults: dict[str, Any] | None = None,
    check: Callable[[Namespace], None] | None = None,
    check_validated: Callable[[Namespace], None] | None = None,
) -> Namespace:
    """Megatron's ``parse_and_validate_args`` with the ``--sla`` flags.

    A flag that cannot be accepted ends the run before anything is written, whoever refuses it: one line on stderr, exit
    status 2.  ``check`` may raise :class:`FlagError` for more, and ``check_validated`` with what Megatron filled in.
    Without ``check`` this is a script of the user's own, in which only what ``--sla`` builds is looked at.
    """

    with one_line_errors():
        args = settled_args(extra_args_provider, ignore_unknown_args, args_defaults, check or _check_own_script)
        # The model is built much later; what Megatron has against it is wanted before anything is written.
        with megatron_refusals():
            core_transformer_config_from_args(args)
            if check_validated is not None:
                check_validated(args)
    check_settings_on_loading(args)
    set_global_variables(args)
    return args


def _check_own_script(args: Namespace) -> None:
    if args.sla:
        refuse_unhonoured(args)


def settled_args(
    extra_args_provider: ArgumentsProvider | None = None,
    ignore_unknown_args: bool = False,
    args_defaults: dict[str, Any] | None = None,
    check: Callable[[Namespace], None] | None = None,
    will_run_here: bool = True,
    argv: Sequence[str] | None = None,
    silent: bool = False,
) -> Namespace:
    """Megatron's flags and ``--sla``, parsed, validated and filled in, without a process group or a global.

    The steps are those of ``megatron.training.arguments.parse_and_validate_args``.  They are spelled out because the
    ``--sla`` flags must be settled between upstream's validation, which fills in the model's shape, and
    ``set_global_variables``, which is the first to write anything.

    Args:
        extra_args_provider, ignore_unknown_args, args_defaults: upstream's.
        check: called with the parsed arguments, before upstream validates them; may change them.
        will_run_here: whether the flags are those of a run on this machine, and are fitted to it.
        argv: the flags, in place of the command line's.
        silent: whether what Megatron prints and warns of meanwhile is dropped.

    Raises:
        FlagError: for what cannot be accepted.
        MegatronRefusal: for what Megatron does not accept.
        MegatronVersionError: if Megatron is of a version that this was not checked with.
    """
    args_defaults = args_defaults or {}
    require_megatron()
    PARSING.require()
    here = nullcontext() if will_run_here else another_machine()
    with _command_line(argv), here, silence() if silent else nullcontext():
        with megatron_refusals():
            args = upstream.parse_args(partial(_with_sla, extra_args_provider), ignore_unknown_args)
        if will_run_here and cpu_backend_is_active():
            fit_to_cpu(args)
        if args.use_checkpoint_args or args_defaults.get("use_checkpoint_args", False):
            with megatron_refusals():
                adopt_checkpoint_args(args)
        # Before upstream's validation, which would end some of these in words of its own.
        refuse_unsupported(args)
        if check is not None:
            check(args)
        with megatron_refusals():
            upstream.validate_args(args, args_defaults)
        resolve_sla_args(args)
        resolve_core_attention(args)
        with megatron_refusals():
            require_same_settings(args)
    return args


def _with_sla(extra_args_provider: ArgumentsProvider | None, parser: ArgumentParser) -> ArgumentParser:
    """Megatron's ``parser`` with all flags, whose errors are one line, and whose help can be printed."""
    parser = add_sla_args(parser)
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)

    def refuse(message: str) -> NoReturn:
        error = refusal(parser, message)
        if isinstance(error, FlagError) and error.value is None and error.flag in map(flag_of, hybrid.NAMES):
            # argparse takes a pattern that begins with an MLP for a flag.
            raise FlagError(error.flag, None, f"a pattern; one that begins with - behind an =, {error.flag}=-*-*")
        raise error

    # argparse's own prints Megatron's usage, of two thousand lines.
    parser.error = refuse
    for action in parser._actions:
        if action.dest == "yaml_cfg":
            action.type = _refuse_yaml
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (KeyError, TypeError, ValueError):
            # A lone % of upstream's, on which argparse ends --help in a traceback.
            action.help = action.help.replace("%", "%%")
    return parser


def _refuse_yaml(path: str) -> NoReturn:
    # What upstream reads there replaces all flags, --sla among them, and lacks what its own trainer looks for.
    raise FlagError("--yaml-cfg", path, "flags in its place")


class MegatronRefusal(StartError):
    """What Megatron has against flags, or the model that they describe; ``complaint`` is in its own words."""

    def __init__(self, complaint: str) -> None:
        self.complaint = complaint
        super().__init__(f"Megatron does not accept these flags: {complaint}")


@contextmanager
def megatron_refusals() -> Iterator[None]:
    """Turn whatever Megatron raises inside the block, about flags or the model they describe, into one line.

    Raises :class:`MegatronRefusal` for it; our own errors come through as they are.
    """
    try:
        yield
    except StartError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        # An assertion without a message says in its own code what it wants.
        text = str(error) or f"{place.line}{_values_in(place.line, error)}"
        if not isinstance(error, AssertionError | ValueError | NotImplementedError | ImportError):
            # Not meant for users, and hardly understood without its place.
            text = f"{type(error).__name__}: {text} ({place.filename}:{place.lineno})"
        raise MegatronRefusal(" ".join(text.split())) from error


def _values_in(code: str, error: Exception) -> str:
    """The flags that ``code``, where ``error`` was raised, looks at, and their values: `` (--hidden-size 96, ...)``."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    given = vars(frame.f_locals["args"]) if isinstance(frame.f_locals.get("args"), Namespace) else {}
    named = dict.fromkeys(name for name in re.findall(r"\bargs\.(\w+)", code) if name in given)
    return f" ({', '.join(f'{flag_of(name)} {given[name]}' for name in named)})" if named else ""


@contextmanager
def _command_line(argv: Sequence[str] | None) -> Iterator[None]:
    """Within the block ``argv``, unless it is ``None``, is what Megatron reads."""
    before = sys.argv
    if argv is not None:
        sys.argv = [before[0], *argv]
    try:
        yield
    finally:
        sys.argv = before
