"""The ``--sla`` flags and ``--core-attention``.  Neither torch nor Megatron is imported, so that help comes at once."""

from __future__ import annotations

from argparse import ArgumentParser, _ArgumentGroup
from collections.abc import Callable, Sequence

from ..attention.sla_config import KV_PROJECTIONS, SHARES
from ..common.errors import FlagError
from ..common.flag_types import WITH_VALUE, known_flags, unknown_flag

#: Values of ``--core-attention``.
MEGATRON, SDPA = "megatron", "sdpa"


def add_sla_args(parser: ArgumentParser) -> ArgumentParser:
    """An ``extra_args_provider`` for Megatron: adds the ``--sla`` flags to ``parser`` and returns it."""
    group = parser.add_argument_group("skip-layer attention", "arXiv 2406.11274")
    group.add_argument("--sla", action="store_true", help="Turn skip-layer attention on.")
    _add_skipping(group)
    group.add_argument(
        "--sla-kv-projection",
        type=_choice("--sla-kv-projection", KV_PROJECTIONS),
        **WITH_VALUE,
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
        "scores and knows neither context parallelism nor packed documents; with --sla or without. Default: megatron, "
        "what the layer spec has.",
    )
    return parser


def _add_skipping(group: _ArgumentGroup) -> None:
    """Which groups skip, what, from where, and in which layers."""
    group.add_argument(
        "--sla-skip-distance",
        type=_count("--sla-skip-distance", "one or more integers >= 1"),
        nargs="*",
        metavar="N",
        help="Skip distance in layers: skip heads of layer l read K/V of layer l - N. With several, the j-th skip "
        "group uses the (j mod count)-th. Of a hybrid model attention layers alone count, here and in --sla-layers. A "
        "share of the layers has a decimal point: 0.75. Default: round(0.75 * layers).",
    )
    group.add_argument(
        "--sla-source-layer",
        type=_count("--sla-source-layer", "one or more layers, counted from 1"),
        nargs="*",
        metavar="N",
        help="In place of a distance: skip heads read layer N in every later consumer layer. With several, the j-th "
        "skip group reads the (j mod count)-th. A share of the layers has a decimal point: 0.5.",
    )
    group.add_argument(
        "--sla-num-skip-groups",
        type=_count("--sla-num-skip-groups", "an integer from 0 to the number of K/V groups"),
        **WITH_VALUE,
        metavar="K",
        help="How many K/V groups skip (query heads: K * heads / groups), or with a decimal point which share of them. "
        "Default: round(0.75 * groups).",
    )
    group.add_argument(
        "--sla-share",
        type=_choice("--sla-share", tuple(SHARES)),
        **WITH_VALUE,
        metavar="{kv,values,keys}",
        help="What skip groups take from their source: keys and values, values alone, or keys alone; the rest is their "
        "own. Default: kv.",
    )
    group.add_argument(
        "--sla-layers",
        **WITH_VALUE,
        metavar="RANGES",
        help="Consumer layers, 1-based, such as 10-12, 4,6,8-12, or 2-/2 (every second one from 2 on). Default: every "
        "layer beyond the distance or the source layer.",
    )


def refuse_unknown_sla_flags(argv: Sequence[str]) -> None:
    """Raise ``StartError`` for a ``--sla...`` that there is not; needs no Megatron, whose import takes seconds."""
    known = known_flags(add_sla_args(ArgumentParser(add_help=False)))
    for number, word in enumerate(argv):
        if word.startswith("--sla") and word.partition("=")[0] not in known:
            raise unknown_flag(argv[number:], known)


def _count(flag: str, accepted: str) -> Callable[[str], int | float]:
    """An integer, or with a decimal point a share in (0, 1]; what of, is known once the model is."""

    def convert(text: str) -> int | float:
        try:
            value = float(text) if "." in text else int(text)
        except ValueError:
            raise FlagError(flag, text, accepted) from None
        if isinstance(value, float) and not 0 < value <= 1:
            raise FlagError(flag, text, f"{accepted}, or a share such as 0.5")
        return value

    return convert


def _choice(flag: str, choices: tuple[str, ...]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in choices:
            raise FlagError(flag, text, " or ".join(choices))
        return text

    return convert
