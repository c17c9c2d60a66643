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

from benchmarks.record import check_output, write_result
from examples.side_by_side.flags import example_parser, with_sla_defaults
from examples.side_by_side.ranks import megatron_started
from sla_megatron.common.errors import one_line_errors

from .report import plot, tables

NAME = "encoder"


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The flags with SLA's defaults filled in.  Raises FlagError, or exits with one line and status 2."""
    parser = example_parser(NAME, __doc__, 3, ("--seq-length", 32, 4, "tokens of the longest sentence"))
    args = with_sla_defaults(parser.parse_args(argv))
    check_output(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train with every seed, print the table, write the JSON file and the plot."""
    with one_line_errors():
        args = parse_args(sys.argv[1:] if argv is None else argv)
    with megatron_started(args) as device_name:
        from .train import measure

        rows = [measure(args, seed) for seed in range(1, args.seeds + 1)]
    write_result(args, NAME, device_name, rows, tables, plot)


if __name__ == "__main__":
    main()
