"""``sla-data inspect``: what a data set in Megatron's indexed format holds, and whether its two files agree."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...common.tokenizers import add_tokenizer_arguments


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``inspect`` to the commands of ``sla-data``."""
    parser = commands.add_parser(
        "inspect",
        help="counts, lengths and texts of a finished data set, and whether its files agree",
        description="Says what PREFIX.bin and PREFIX.idx hold, and checks them. Exit status: 0 sound, 1 not sound, "
        "2 cannot be read.",
    )
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="as pretraining's --data-path takes it")
    parser.add_argument("--documents", type=_count, default=3, metavar="N", help="show the first N; default 3")
    parser.add_argument("--characters", type=_count, default=400, metavar="N", help="of each at most; default 400")
    parser.add_argument("--no-scan", action="store_true", help="check the index alone, not every token id")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="the documents' lengths as a picture")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing picture")
    add_tokenizer_arguments(parser)
    parser.set_defaults(command=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from .inspection_report import inspect

    return inspect(args)


def _count(text: str) -> int:
    # argparse's own words for what int() refuses would be "invalid _count value".
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 0 or more")
    return int(text)
