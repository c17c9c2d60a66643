"""The flags of an example that trains a dense model and a skip-layer one side by side, and their checks."""

from __future__ import annotations

import argparse

from benchmarks.record import add_output_args
from sla_megatron.attention.sla_config import default_num_skip_groups, default_skip_distance
from sla_megatron.common.errors import FlagError
from sla_megatron.common.flag_types import OneLineParser, count
from sla_megatron.cpu.device import add_device_arg, require_device_name

#: Flag, default, least, what it says.
Size = tuple[str, int, int, str]

_SIZES: tuple[Size, ...] = (
    ("--layers", 8, 1, "of each model"),
    ("--hidden", 64, 2, "hidden size"),
    ("--heads", 8, 1, "attention heads, each with K/V of its own"),
    ("--steps", 400, 1, "of each model with each seed"),
)


def example_parser(name: str, description: str, seeds: int, further: Size) -> argparse.ArgumentParser:
    """The parser of ``examples.NAME``: sizes, what SLA is, where it runs and where the result goes.

    Args:
        name: the example's.
        description: for ``--help``.
        seeds: how many are the default.
        further: a size that is this example's alone.
    """
    parser = OneLineParser(
        prog=f"examples.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default, least, meaning in (*_SIZES, ("--seeds", seeds, 1, "runs, of seed 1, 2, ..."), further):
        convert = count(flag, least)
        parser.add_argument(flag, type=convert, default=default, metavar="N", help=f"{meaning} (default: {default})")
    distance = count("--distance")
    parser.add_argument("--distance", type=distance, nargs="+", metavar="N", help="default: round(0.75 * layers)")
    parser.add_argument(
        "--skip-groups", type=count("--skip-groups", 0), metavar="K", help="default: round(0.75 * heads)"
    )
    parser.add_argument(
        "--core-attention", choices=("megatron", "sdpa"), default="megatron", help="default: %(default)s"
    )
    return add_output_args(add_device_arg(parser), name)


def with_sla_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """``args`` with SLA's defaults filled in.  Raises FlagError for what no model of that shape can be."""
    require_device_name(args.device)
    args.distance = args.distance or [default_skip_distance(args.layers) or 1]
    if args.skip_groups is None:
        args.skip_groups = default_num_skip_groups(args.heads)
    if args.hidden % (2 * args.heads):
        raise FlagError("--hidden", args.hidden, f"a multiple of {2 * args.heads}: {args.heads} heads of even size")
    if args.skip_groups > args.heads:
        raise FlagError("--skip-groups", args.skip_groups, f"an integer from 0 to {args.heads}, the number of heads")
    if len(args.distance) > max(1, args.skip_groups):
        raise FlagError("--distance", args.distance, f"at most as many as skip groups, {args.skip_groups}")
    return args
