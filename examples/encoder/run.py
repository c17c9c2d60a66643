"""Skip-layer attention in a bidirectional encoder: Megatron's BERT, dense and with SLA, on data made on the spot.

    python -m examples.encoder.run                             # 3 seeds of 400 steps; a few minutes on a CPU core
    python -m examples.encoder.run --distance 1 --out runs/encoder-1.json
    python -m examples.encoder.run --layers 12 --hidden 96 --heads 12 --steps 1000 --device cuda

Both models of a seed start from the same weights, read the same sentences, and take turns step by step.  See
``data.py`` for what they learn, ``models.py`` for how SLA comes into Megatron's model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.record import add_output_args, check_output, write_result
from sla_megatron.attention.sla_config import default_num_skip_groups, default_skip_distance
from sla_megatron.common.errors import FlagError, one_line_errors
from sla_megatron.common.flag_types import OneLineParser, count
from sla_megatron.common.silence import without_announcements
from sla_megatron.cpu.device import add_device_arg, megatron_device

from .report import plot, tables

NAME = "encoder"

#: Flag, default, least, what it says.
_SIZES = (
    ("--layers", 8, 1, "of the encoder"),
    ("--hidden", 64, 2, "hidden size"),
    ("--heads", 8, 1, "attention heads, each with K/V of its own"),
    ("--seq-length", 32, 4, "tokens of the longest sentence"),
    ("--steps", 400, 1, "of each model with each seed"),
    ("--seeds", 3, 1, "runs, of seed 1, 2, ..."),
)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The flags with SLA's defaults filled in.  Raises FlagError, or exits with one line and status 2."""
    parser = OneLineParser(
        prog="examples.encoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default, least, meaning in _SIZES:
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
    add_output_args(add_device_arg(parser), NAME)
    args = parser.parse_args(argv)
    args.distance = args.distance or [default_skip_distance(args.layers) or 1]
    if args.skip_groups is None:
        args.skip_groups = default_num_skip_groups(args.heads)
    _check(args)
    check_output(parser, args)
    return args


def _check(args: argparse.Namespace) -> None:
    if args.hidden % (2 * args.heads):
        raise FlagError("--hidden", args.hidden, f"a multiple of {2 * args.heads}: {args.heads} heads of even size")
    if args.skip_groups > args.heads:
        raise FlagError("--skip-groups", args.skip_groups, f"an integer from 0 to {args.heads}, the number of heads")
    if len(args.distance) > max(1, args.skip_groups):
        raise FlagError("--distance", args.distance, f"at most as many as skip groups, {args.skip_groups}")


def main(argv: Sequence[str] | None = None) -> None:
    """Train with every seed, print the table, write the JSON file and the plot."""
    with one_line_errors():
        args = parse_args(sys.argv[1:] if argv is None else argv)
    with without_announcements(), megatron_device(["--device", args.device]) as device:
        import torch

        from .models import start_megatron
        from .train import measure

        args.device = device
        # Matrices this small gain little from more, and on a busy machine the threads wait for each other.
        torch.set_num_threads(1)
        start_megatron(device)
        rows = [measure(args, seed) for seed in range(1, args.seeds + 1)]
        name = torch.cuda.get_device_name()
        torch.distributed.destroy_process_group()
    write_result(args, NAME, name, rows, tables, plot)


if __name__ == "__main__":
    main()
