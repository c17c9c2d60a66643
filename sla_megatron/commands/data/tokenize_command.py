"""``sla-data tokenize``: flags and what is printed."""

from __future__ import annotations

import argparse
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.splits import split_hint
from ...common.tokenizers import TokenizerError, add_tokenizer_arguments, tokenizer_settings
from .documents import FAULTS
from .errors import DataError
from .inputs import add_input_arguments, inputs_from_args
from .manifests import SPLITS
from .progress import waiting_for

if TYPE_CHECKING:
    from .job import Job


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``tokenize`` to ``sla-data``."""
    parser = commands.add_parser("tokenize", help="text to Megatron's indexed format, PREFIX.bin and PREFIX.idx")
    add_tokenize_arguments(parser)
    parser.set_defaults(command=_tokenize)


def add_tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of ``tokenize``."""
    add_input_arguments(parser)
    add_tokenizer_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX", help="what --data-path takes")
    group.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end documents with the tokenizer's end-of-document token; default yes",
    )
    group.add_argument(
        "--split",
        type=_weights,
        metavar="W,W,W",
        help="weights of train, valid and test, such as 98,1,1: PREFIX_train and so on, each document by its hash",
    )
    group.add_argument("--deduplicate", action="store_true", help="of documents with the same text, keep the first")
    group.add_argument("--on-error", choices=("fatal", "skip"), default="fatal", help="for faulty documents")
    group.add_argument("--workers", type=worker_count, default=1, metavar="N", help="most processes; default 1")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew, and replace an earlier data set of this name when the new one is whole",
    )


def _weights(text: str) -> tuple[float, ...]:
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    sound = all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if not (sound and 1 <= len(weights) <= len(SPLITS) and sum(weights) > 0):
        raise argparse.ArgumentTypeError(f"{text}: expected up to three weights, such as 98,1,1")
    return weights


def worker_count(text: str) -> int:
    """A flag's number of processes."""
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 1 to 1024")
    return int(text)


def _tokenize(args: Namespace) -> int:
    job = job_from_args(args)
    from .tokenizing import tokenize

    report(job, tokenize(job, args.workers, args.overwrite))
    return 0


def job_from_args(args: Namespace) -> Job:
    """What the flags mean; ``DataError`` or ``TokenizerError`` for what cannot be meant."""
    if args.tokenizer_type is None:
        raise TokenizerError("--tokenizer-type: expected one, such as SentencePieceTokenizer")
    if not args.output_prefix.name:
        raise DataError(f"--output-prefix {args.output_prefix}: expected a name, such as data/corpus")
    with waiting_for("opening the input", quick=True):
        from .job import Job

        return Job(
            inputs=inputs_from_args(args),
            prefix=args.output_prefix,
            tokenizer=tokenizer_settings(args),
            append_eod=args.append_eod,
            split=args.split,
            deduplicate=args.deduplicate,
            fatal=args.on_error == "fatal",
        )


def report(job: Job, manifest: dict[str, Any]) -> None:
    """Print what was made."""
    for name, output in manifest["outputs"].items():
        shown = "" if name == "all" else f"{name}: "
        prefix = job.prefix.with_name(output["prefix"])
        print(f"{shown}{prefix}: {output['documents']:,} documents, {output['tokens']:,} tokens")
        if name == "all" and (hint := split_hint(output["documents"])):
            print(f"sla-data: {prefix}: {hint}", file=sys.stderr)
    text = manifest["text_bytes"] / max(manifest["tokens"], 1)
    print(f"{manifest['text_bytes']:,} bytes of text, {text:.2f} a token; {manifest['lines']:,} lines or rows read")
    for count, what in [(manifest["blank_lines"], "blank lines"), (manifest["duplicates"], "duplicates left out")]:
        if count:
            print(f"{count:,} {what}")
    for kind, count in manifest["faults"].items():
        print(f"{count:,} left out: {FAULTS[kind]} ({kind} in {job.workdir.faults})")
