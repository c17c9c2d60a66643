"""``sla-data tokenizer``: flags and what is printed."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from .documents import FAULTS
from .inputs import add_input_arguments, inputs_from_args, megabytes
from .training_tokenizer import (
    COVERAGE,
    MODEL_TYPES,
    NORMALIZATIONS,
    ModelSettings,
    Sample,
    Trained,
    train_tokenizer,
)

_DESCRIPTION = """\
Trains a sentencepiece model on a sample of the documents.

With the defaults text comes back from its tokens as it was, spaces, line ends and characters that the sample lacks
included. There is one exception: the character U+2581, which sentencepiece writes for a space, comes back as a space;
documents that contain it are counted. The same input and flags give the same bytes, whatever the order of the files.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``tokenizer`` to ``sla-data``."""
    parser = commands.add_parser(
        "tokenizer",
        help="a sentencepiece model, trained on text",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_input_arguments(parser)
    group = parser.add_argument_group("sample")
    group.add_argument("--sample-mb", type=megabytes, default=200 * 10**6, metavar="MB", help="of text to train on: "
                       "documents from all of the input, each as likely as any other; default 200, for which bpe "
                       "takes about 2.5 GB of memory")  # fmt: skip
    group.add_argument(
        "--seed", type=_whole(0, 2**64 - 1), default=0, metavar="N", help="another seed, another sample; default 0"
    )
    group.add_argument("--on-error", choices=("fatal", "skip"), default="fatal", help="for faulty documents")
    _add_model_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, required=True, metavar="FILE", help="such as tokenizer.model")
    group.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(command=_tokenizer)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    # The most is beyond any model; sentencepiece would count in vain for long.
    group.add_argument("--vocab-size", type=_whole(1, 10**7), required=True, metavar="N", help="tokens of every kind")
    group.add_argument("--model-type", choices=MODEL_TYPES, default="bpe", help="default bpe")
    group.add_argument(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="bytes stand for characters without a token, which else become <unk>; default yes",
    )
    group.add_argument(
        "--character-coverage",
        type=_coverage,
        default=0.9995,
        metavar="SHARE",
        help="of the sample's characters that have tokens; default 0.9995",
    )
    group.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        default="identity",
        help="default identity; nmt_nfkc unifies forms of characters: text comes back changed",
    )
    group.add_argument(
        "--user-symbols", nargs="+", default=[], metavar="TEXT", help="always one token each, as a line end is"
    )
    group.add_argument("--split-digits", action="store_true", help="each digit a token")
    group.add_argument(
        "--threads",
        type=_whole(1, 1024),  # sentencepiece takes no more.
        default=16,
        metavar="N",
        help="of unigram; another number changes its scores in their last digits, and so the file; default 16",
    )


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {least} to {most}")
        return int(text)

    return read


def _coverage(text: str) -> float:
    low, high = COVERAGE
    share = float(text) if text.replace(".", "", 1).isdecimal() else 0.0
    if not low <= share <= high:
        raise argparse.ArgumentTypeError(f"{text}: expected a share from {low} to {high}")
    return share


def _tokenizer(args: Namespace) -> int:
    settings = ModelSettings(
        vocab_size=args.vocab_size,
        model_type=args.model_type,
        byte_fallback=args.byte_fallback,
        character_coverage=args.character_coverage,
        normalization=args.normalization,
        user_symbols=tuple(args.user_symbols),
        split_digits=args.split_digits,
        threads=args.threads,
    )
    settings.check()
    sample = Sample(args.sample_mb, args.seed)
    fatal = args.on_error == "fatal"
    _report(train_tokenizer(inputs_from_args(args), args.output, settings, sample, fatal, args.overwrite))
    return 0


def _report(trained: Trained) -> None:
    read = trained.read
    print(
        f"sample: {trained.sample_bytes / 1e6:,.1f} of {read.text_bytes / 1e6:,.1f} MB of text, "
        f"{trained.sample_documents:,} of {read.documents:,} documents"
    )
    for kind in FAULTS:
        if read.faults[kind]:
            print(f"{read.faults[kind]:,} left out: {FAULTS[kind]}")
    if read.marked:
        print(f"{read.marked:,} with U+2581, which comes back as a space")
    if trained.settings.normalization != "identity":
        print(f"--normalization {trained.settings.normalization}: text does not come back as it was")
    print(
        f"{trained.path}: {trained.settings.vocab_size:,} tokens, {trained.bytes_per_token:.2f} bytes of text each "
        f"on {trained.measured_bytes / 1e6:,.1f} MB of the sample"
    )
    print(f"flags for sla-data tokenize and for pretraining: {trained.flags}")
