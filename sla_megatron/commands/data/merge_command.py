"""``sla-data merge``: several data sets of the indexed format to one."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path

from tqdm import tqdm

from ...common.silence import without_announcements
from ...common.splits import split_hint
from .errors import DataError, file_errors
from .merging import IndexedWriter, Part


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``merge`` to ``sla-data``."""
    parser = commands.add_parser("merge", help="several data sets, in the order given, to one")
    parser.add_argument("prefixes", nargs="+", type=Path, metavar="PREFIX")
    parser.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX")
    parser.add_argument("--overwrite", action="store_true")
    parser.set_defaults(command=_merge)


def _merge(args: Namespace) -> int:
    out = args.output_prefix
    for prefix in args.prefixes:
        for suffix in (".bin", ".idx"):
            if not Path(f"{prefix}{suffix}").is_file():
                raise DataError(f"{prefix}{suffix}: expected a file")
        if prefix.absolute() == out.absolute():
            raise DataError(f"--output-prefix {out}: expected another than those to merge")
    if not args.overwrite and (there := [s for s in (".bin", ".idx") if Path(f"{out}{s}").exists()]):
        raise DataError(f"{out}{there[0]} exists: expected another --output-prefix, or --overwrite")
    with without_announcements():
        from megatron.core.datasets.indexed_dataset import _IndexReader

        dtype = _IndexReader(f"{args.prefixes[0]}.idx", multimodal=False).dtype
    with file_errors(f"--output-prefix {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with IndexedWriter(out, dtype) as writer:
            for prefix in tqdm(args.prefixes, desc="merging", unit="data set", disable=len(args.prefixes) < 3):
                writer.add(Part(prefix))
            writer.finish()
    print(f"{out}: {writer.documents:,} documents, {writer.tokens:,} tokens")
    if hint := split_hint(writer.documents):
        print(hint)
    return 0
