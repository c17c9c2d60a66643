"""What the ``--sla`` flags say: checked, with their defaults filled in, and as an ``SLAConfig``.

Each refusal is a :class:`~sla_megatron.FlagError`: one line with the flag, its value and what is accepted.
"""

from __future__ import annotations

import re
from argparse import Namespace

from ..attention.sla_config import SLAConfig, compact_ranges, default_num_skip_groups, default_skip_distance, of_share
from ..common.errors import FlagError
from .asked import hybrid_pattern, layer_numbers

#: The flags beside ``--sla``, as attributes of the parsed arguments.  They are stored with every checkpoint.
SLA_SETTINGS = (
    "sla_skip_distance",
    "sla_source_layer",
    "sla_num_skip_groups",
    "sla_layers",
    "sla_share",
    "sla_kv_projection",
)


def sla_config_from_args(args: Namespace) -> SLAConfig | None:
    """What parsed and resolved arguments say about skip-layer attention; ``None`` without ``--sla``."""
    if not getattr(args, "sla", False):
        return None
    return SLAConfig(
        num_layers=num_attention_layers(args),
        num_query_groups=num_query_groups(args),
        skip_distances=tuple(args.sla_skip_distance or ()),
        num_skip_groups=args.sla_num_skip_groups,
        layers=None if args.sla_layers is None else _consumer_layers(args),
        kv_projection=args.sla_kv_projection,
        # Checkpoints of before have neither.
        share=getattr(args, "sla_share", None) or "kv",
        source_layers=tuple(getattr(args, "sla_source_layer", None) or ()),
    )


def num_attention_layers(args: Namespace) -> int:
    """``L``: of a hybrid model the attention layers alone, which the ``--sla`` flags count."""
    return len(layer_numbers(args).attention)


def num_query_groups(args: Namespace) -> int:
    """``G``: Megatron's ``--num-query-groups`` counts only with ``--group-query-attention``."""
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def resolve_settings(args: Namespace) -> None:
    """Check what the ``--sla`` flags of validated arguments say and fill in their defaults, in place.

    Shares become counts of layers or groups, and layers are spelled out.  Raises :class:`FlagError`.
    """
    groups, layers = num_query_groups(args), num_attention_layers(args)
    if args.sla_num_skip_groups is None:
        args.sla_num_skip_groups = default_num_skip_groups(groups)
    args.sla_num_skip_groups = _count(args.sla_num_skip_groups, groups)
    if not 0 <= args.sla_num_skip_groups <= groups:
        raise FlagError("--sla-num-skip-groups", args.sla_num_skip_groups, f"an integer from 0 to {groups}")
    if args.sla_source_layer is None:
        _resolve_distances(args, layers)
    else:
        _resolve_sources(args, layers)
    args.sla_share = args.sla_share or "kv"
    args.sla_kv_projection = args.sla_kv_projection or "full"
    if args.sla_layers is not None:
        _check_layers(args)


def _resolve_distances(args: Namespace, layers: int) -> None:
    if args.sla_skip_distance is None:
        args.sla_skip_distance = [default_skip_distance(layers)]
    args.sla_skip_distance = [_count(distance, layers) for distance in args.sla_skip_distance]
    if not args.sla_skip_distance or min(args.sla_skip_distance) < 1:
        raise FlagError("--sla-skip-distance", args.sla_skip_distance, "one or more integers >= 1")
    _check_number(args, "--sla-skip-distance", args.sla_skip_distance, "distances")


def _resolve_sources(args: Namespace, layers: int) -> None:
    if args.sla_skip_distance is not None:
        raise FlagError("--sla-source-layer", args.sla_source_layer, "no --sla-skip-distance beside it")
    args.sla_source_layer = [_count(source, layers) for source in args.sla_source_layer]
    if not args.sla_source_layer or not set(args.sla_source_layer) <= set(range(1, layers + 1)):
        raise FlagError("--sla-source-layer", args.sla_source_layer, f"one or more layers within 1-{layers}")
    _check_number(args, "--sla-source-layer", args.sla_source_layer, "source layers")


def _check_number(args: Namespace, flag: str, values: list[int], what: str) -> None:
    if len(values) > max(1, args.sla_num_skip_groups):
        raise FlagError(flag, values, f"at most as many {what} as skip groups, {args.sla_num_skip_groups}")


def _count(value: int | float, whole: int) -> int:
    """A count as it is, or a share of ``whole``, rounded as the defaults are."""
    return of_share(value, whole) if isinstance(value, float) else value


def _check_layers(args: Namespace) -> None:
    layers, last = _consumer_layers(args), num_attention_layers(args)
    nearest = min(args.sla_source_layer or args.sla_skip_distance)
    too_early = [layer for layer in layers if layer <= nearest]
    if too_early:
        eligible = f"{nearest + 1}-{last}" if nearest < last else "no --sla-layers"
        behind = "source layer" if args.sla_source_layer else "distance"
        raise FlagError("--sla-layers", args.sla_layers, f"layers beyond the {behind} {nearest}: {eligible}")
    args.sla_layers = compact_ranges(layers)


def _consumer_layers(args: Namespace) -> tuple[int, ...]:
    pattern = hybrid_pattern(args)
    of = "" if pattern is None else f" (attention layers of {pattern})"
    return parse_layers(args.sla_layers, num_attention_layers(args), of)


def parse_layers(text: str, num_layers: int, of: str = "") -> tuple[int, ...]:
    """``"4,6,8-12"`` as ascending layers; ``of`` goes behind what is accepted.

    ``"9-"`` ends with the last layer, and ``"2-/2"`` is every second layer of such a range.
    Raises :class:`FlagError` unless all are within ``1..num_layers``.
    """
    accepted = f"layers within 1-{num_layers}{of}, such as {max(1, num_layers - 2)}-{num_layers} or 1,{num_layers}"
    layers: set[int] = set()
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:(-)\s*(\d+)?\s*(?:/\s*(\d+)\s*)?)?", part)
        if match is None:
            raise FlagError("--sla-layers", text, accepted)
        first, last, step = int(match[1]), int(match[3] or (num_layers if match[2] else match[1])), int(match[4] or 1)
        if not 1 <= first <= last <= num_layers or step < 1:
            raise FlagError("--sla-layers", text, accepted)
        layers.update(range(first, last + 1, step))
    return tuple(sorted(layers))
