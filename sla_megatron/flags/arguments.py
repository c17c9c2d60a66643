"""The ``--sla`` flags, and Megatron's parsing with them.

A script that calls Megatron's ``parse_and_validate_args`` calls the one here instead; nothing else changes.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from megatron.training import arguments as upstream
from megatron.training.global_vars import set_global_variables
from megatron.training.yaml_arguments import validate_yaml

from ..attention.core_attention import MEGATRON, SDPA, resolve_core_attention
from ..attention.sla_config import KV_PROJECTIONS
from ..common.errors import FlagError, one_line_errors
from ..cpu import cpu_backend_is_active
from ..cpu.flags import fit_to_cpu
from ..upstream.seams import Reliance, require_megatron
from .checkpoint_settings import adopt_checkpoint_args, require_same_settings
from .validation import refuse_unsupported, resolve_sla_args

ArgumentsProvider = Callable[[ArgumentParser], ArgumentParser]

PARSING = Reliance(
    "megatron.training.arguments:parse_and_validate_args",
    "its steps are spelled out here, to settle the --sla flags between two of them",
    ("extra_args_provider", "ignore_unknown_args", "args_defaults"),
)


def add_sla_args(parser: ArgumentParser) -> ArgumentParser:
    """An ``extra_args_provider`` for Megatron: adds the ``--sla`` flags to ``parser`` and returns it."""
    group = parser.add_argument_group("skip-layer attention", "arXiv 2406.11274")
    group.add_argument("--sla", action="store_true", help="Turn skip-layer attention on.")
    group.add_argument(
        "--sla-skip-distance",
        type=_integer("--sla-skip-distance", "one or more integers >= 1"),
        nargs="*",
        metavar="N",
        help="Skip distance in layers: skip heads of layer l read K/V of layer l - N. With several, the j-th skip "
        "group uses the (j mod count)-th. Default: round(0.75 * layers).",
    )
    group.add_argument(
        "--sla-num-skip-groups",
        type=_integer("--sla-num-skip-groups", "an integer from 0 to the number of K/V groups"),
        nargs="?",
        const="",
        metavar="K",
        help="How many K/V groups skip (query heads: K * heads / groups). Default: round(0.75 * groups).",
    )
    group.add_argument(
        "--sla-layers",
        nargs="?",
        const="",
        metavar="RANGES",
        help="Consumer layers, 1-based, such as 10-12 or 4,6,8-12. Default: every layer beyond the distance.",
    )
    group.add_argument(
        "--sla-kv-projection",
        type=_choice("--sla-kv-projection", KV_PROJECTIONS),
        nargs="?",
        const="",
        metavar="{full,pruned}",
        help="Keep K/V projections that nobody reads (full: the dense model's shapes) or leave them out (pruned: "
        "fewer parameters). Default: full.",
    )
    group.add_argument(
        "--core-attention",
        type=_choice("--core-attention", (MEGATRON, SDPA)),
        default=MEGATRON,
        metavar="{megatron,sdpa}",
        help="sdpa: torch's scaled_dot_product_attention in the place of Megatron's local one, which keeps [s, s] "
        "scores; with --sla or without. Default: megatron, what the layer spec has.",
    )
    return parser


def parse_and_validate_args(
    extra_args_provider: ArgumentsProvider | None = None,
    ignore_unknown_args: bool = False,
    args_defaults: dict[str, Any] | None = None,
    check: Callable[[Namespace], None] | None = None,
) -> Namespace:
    """Megatron's ``parse_and_validate_args`` with the ``--sla`` flags.

    A bad value ends the run before anything is written: one line on stderr, exit status 2.  ``check`` may raise
    :class:`FlagError` for more.
    """

    with one_line_errors():
        args = settled_args(extra_args_provider, ignore_unknown_args, args_defaults, check)
    set_global_variables(args)
    return args


def settled_args(
    extra_args_provider: ArgumentsProvider | None = None,
    ignore_unknown_args: bool = False,
    args_defaults: dict[str, Any] | None = None,
    check: Callable[[Namespace], None] | None = None,
    will_run_here: bool = True,
) -> Namespace:
    """Megatron's flags and ``--sla``, parsed, validated and filled in, without a process group or a global.

    The steps are those of ``megatron.training.arguments.parse_and_validate_args``.  They are spelled out because the
    ``--sla`` flags must be settled between upstream's validation, which fills in the model's shape, and
    ``set_global_variables``, which is the first to write anything.  Without ``will_run_here`` the flags are those of a
    run on another machine, and are not fitted to this one.

    Raises:
        FlagError: for what cannot be accepted.
        MegatronVersionError: if Megatron is of a version that this was not checked with.
    """
    args_defaults = args_defaults or {}
    require_megatron()
    PARSING.require()

    def provider(parser: ArgumentParser) -> ArgumentParser:
        parser = _with_working_help(add_sla_args(parser))
        return extra_args_provider(parser) if extra_args_provider is not None else parser

    args = upstream.parse_args(provider, ignore_unknown_args)
    if will_run_here and cpu_backend_is_active():
        fit_to_cpu(args)
    if args.use_checkpoint_args or args_defaults.get("use_checkpoint_args", False):
        adopt_checkpoint_args(args)
    # Before upstream's validation, which would end some of these in a traceback of its own.
    refuse_unsupported(args)
    if check is not None:
        check(args)
    if args.yaml_cfg is not None:
        args = validate_yaml(args, args_defaults)
    else:
        upstream.validate_args(args, args_defaults)
    resolve_sla_args(args)
    resolve_core_attention(args)
    require_same_settings(args)
    return args


def _with_working_help(parser: ArgumentParser) -> ArgumentParser:
    """Escape the lone ``%`` in a help text of upstream's, on which argparse ends ``--help`` in a traceback."""
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (KeyError, TypeError, ValueError):
            action.help = action.help.replace("%", "%%")
    return parser


def _integer(flag: str, accepted: str) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise FlagError(flag, text, accepted) from None

    return convert


def _choice(flag: str, choices: tuple[str, ...]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in choices:
            raise FlagError(flag, text, " or ".join(choices))
        return text

    return convert
