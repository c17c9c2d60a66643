"""Trains a SentencePiece tokenizer on a corpus and writes the corpus in Megatron's indexed format, with sla-data.

    python -m examples.quickstart.build_dataset runs/code                  # Python's own sources
    python -m examples.quickstart.build_dataset runs/prose --text prose    # English, of packages' docstrings

    DIR/corpus.jsonl            the text, a document a line
    DIR/tokenizer.model         for --tokenizer-type SentencePieceTokenizer --tokenizer-model
    DIR/corpus.bin, .idx, .json for --data-path DIR/corpus; settings and counts
    DIR/dataset.json            what it was made from; once all is there, its counts too

An interrupted build goes on; nothing that is finished is made again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece

from examples.quickstart import corpus, prose
from sla_megatron.commands.data import cli
from sla_megatron.common.errors import one_line_errors
from sla_megatron.common.files import flush, write_json
from sla_megatron.common.flag_types import OneLineParser, count, number
from sla_megatron.common.waiting import waiting_for

MANIFEST = "dataset.json"

#: What a text is called -> what is said of it while it is read, and who reads it.
TEXTS = {
    "code": ("Python's own sources", corpus.read_documents),
    "prose": ("the prose of packages' docstrings", prose.read_documents),
}


class DatasetError(RuntimeError):
    """The place for the data set is taken by something that must not be overwritten."""


@dataclass(frozen=True)
class Dataset:
    """A finished data set on disk."""

    directory: Path
    documents: int
    tokens: int
    vocab_size: int

    @property
    def prefix(self) -> Path:
        """What --data-path takes: the path of the .bin and .idx files without their suffix."""
        return self.directory / "corpus"

    @property
    def tokenizer_model(self) -> Path:
        return self.directory / "tokenizer.model"


def load_manifest(directory: Path) -> dict | None:
    """What a data set was made from, and its counts if it is finished; None when `directory` is not one."""
    try:
        return json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def build(
    directory: Path,
    max_bytes: int,
    vocab_size: int,
    say: Callable[[str], None] = print,
    root: Path | None = None,
    text: str = "code",
) -> Dataset:
    """The data set at `directory`, made, or finished, if it is not there yet.

    `max_bytes` of `text`, one of TEXTS, from `root` (default: this Python's own), `vocab_size` tokens. A data set
    made from the same text and settings is used as it is; anything else at `directory` raises DatasetError and
    is left alone. What sla-data cannot do it says in one line, and raises SystemExit. `say` receives lines of
    progress. Only one build of a directory may run at a time (the caller's lock).
    """
    name, read_documents = TEXTS[text]
    say(f"reading {name}, up to {max_bytes / 1e6:g} MB")
    with waiting_for("text", "reads sources", quick=True):
        documents = read_documents(max_bytes, root)
    made_from = {
        "corpus_sha256": corpus.fingerprint(documents),
        "vocab_size": vocab_size,
        "sentencepiece": sentencepiece.__version__,
    }
    if directory.exists():
        manifest = load_manifest(directory)
        if manifest is None:
            raise DatasetError(f"{directory} is not a data set of the quickstart; it was left alone")
        if manifest["made_from"] != made_from:
            raise DatasetError(f"{directory} was made from other text or settings; it was left alone")
        if "tokens" in manifest:
            say(f"using the data set in {directory}")
            return Dataset(directory, manifest["documents"], manifest["tokens"], manifest["vocab_size"])
    else:
        write_text(directory, documents, made_from)
    return _finish(directory, vocab_size, made_from, say)


def write_text(directory: Path, documents: list[str], made_from: dict) -> None:
    """Makes `directory`, with the text and what marks it as the quickstart's, complete or not at all."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted build left
    partial.mkdir(parents=True)
    try:
        text = partial / "corpus.jsonl"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        flush(text)
        write_json(partial / MANIFEST, {"made_from": made_from})
        os.rename(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _finish(directory: Path, vocab_size: int, made_from: dict, say: Callable[[str], None]) -> Dataset:
    """Trains the tokenizer and encodes the text in `directory`, or what an interrupted build left of it."""
    text, model, prefix = (str(directory / name) for name in ("corpus.jsonl", "tokenizer.model", "corpus"))
    if not Path(model).exists():
        sla_data(["tokenizer", "--input", text, "--output", model, "--vocab-size", str(vocab_size)], say)
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    sla_data(["tokenize", "--input", text, "--output-prefix", prefix, *tokenizer], say)
    made = json.loads(Path(f"{prefix}.json").read_text())
    dataset = Dataset(directory, made["documents"], made["tokens"], made["vocab_size"])
    counts = {key: value for key, value in asdict(dataset).items() if key != "directory"}
    write_json(directory / MANIFEST, {"made_from": made_from, **counts})
    return dataset


def sla_data(argv: list[str], say: Callable[[str], None]) -> None:
    """Runs one of sla-data's commands in this process. Raises SystemExit, after its line on stderr, if it fails."""
    say(f"$ sla-data {shlex.join(argv)}")
    cli.main(argv)


def main(argv: list[str] | None = None) -> None:
    """Builds one data set. One line and status 2 or 1 for what cannot be accepted, or made."""
    parser = OneLineParser(
        prog="build_dataset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--text", choices=tuple(TEXTS), default="code", help="default: %(default)s")
    size = number("--corpus-mb", float, "a number of megabytes, 1 or more", 1)
    parser.add_argument("--corpus-mb", type=size, default=8.0, metavar="MB", help="text; default: 8 MB")
    vocabulary = count("--vocab-size", 512)
    parser.add_argument("--vocab-size", type=vocabulary, default=4096, metavar="N", help="default: %(default)s")
    with one_line_errors():
        args = parser.parse_args(argv)
    try:
        dataset = build(args.directory, int(args.corpus_mb * 1e6), args.vocab_size, text=args.text)
    except (DatasetError, corpus.CorpusError) as error:
        sys.exit(f"build_dataset: error: {error}")
    print(f"{dataset.documents:,} documents, {dataset.tokens:,} tokens in {dataset.directory}")


if __name__ == "__main__":
    main()
