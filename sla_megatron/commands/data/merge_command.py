"""``sla-data merge``: several data sets of the indexed format to one."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``merge`` to ``sla-data``."""
    parser = commands.add_parser("merge", help="several data sets of one tokenizer, in the order given, to one")
    parser.add_argument("prefixes", nargs="+", type=Path, metavar="PREFIX")
    parser.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier data set of this name when the new one is whole"
    )
    parser.set_defaults(command=_merge)


def _merge(args: Namespace) -> int:
    from .joining import join

    return join(args.prefixes, args.output_prefix, args.overwrite)
