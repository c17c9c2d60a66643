"""Trains a SentencePiece tokenizer on a corpus and writes the corpus in Megatron's indexed format.

    DIR/tokenizer.model   for --tokenizer-type SentencePieceTokenizer --tokenizer-model
    DIR/corpus.bin, .idx  for --data-path DIR/corpus
    DIR/dataset.json      what it was made from

DIR appears complete or not at all: everything is written next to it and renamed at the end.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece

from examples.quickstart import corpus

MANIFEST = "dataset.json"
NEWLINE = "\n"
# Ids of the control tokens. Megatron ends documents with eos, and needs a pad that is none of the others.
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3


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


def train_tokenizer(documents: list[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model (serialised) that gives back any text without U+2581 unchanged.

    Deterministic: one thread, no sampling. Bytes stand in for characters it has not seen; a newline is one
    token; runs of spaces, which source code is full of, may become tokens too.
    """
    lines = (line for text in documents for line in text.split(NEWLINE) if line)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        user_defined_symbols=[NEWLINE],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        shuffle_input_sentence=False,
        max_sentence_length=1 << 20,
        num_threads=1,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=PAD_ID,
        minloglevel=2,
    )
    return model.getvalue()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences announcements that CUDA, Apex and Transformer Engine are missing: they have no use here."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def write_indexed(documents: list[str], model: bytes, prefix: Path) -> int:
    """Writes each document's token ids, ended by eos, to `prefix`.bin and .idx; returns the token count."""
    import numpy

    with quiet():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    # Ids fit in 16 bits up to Megatron's own limit of 65,500.
    dtype = numpy.uint16 if tokenizer.get_piece_size() < 65_500 else numpy.int32
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=dtype)
    total = 0
    for text in documents:
        ids = [*tokenizer.encode(text), EOS_ID]
        builder.add_document(numpy.array(ids, dtype=dtype), [len(ids)])
        total += len(ids)
    builder.finalize(get_idx_path(str(prefix)))
    return total


def load_manifest(directory: Path) -> dict | None:
    """What a finished data set was made from; None when `directory` is not one."""
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
) -> Dataset:
    """The data set at `directory`, made if it is not there yet.

    `max_bytes` of text from `root` (default: this Python's standard library), `vocab_size` tokens. A finished
    data set made from the same text and settings is used as it is; anything else at `directory` raises
    DatasetError and is left alone. `say` receives lines of progress. Only one build of a directory may run
    at a time (the caller's lock).
    """
    say(f"reading Python's own sources, up to {max_bytes / 1e6:g} MB")
    documents = corpus.read_documents(max_bytes, root)
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
        say(f"using the data set in {directory}")
        return Dataset(directory, manifest["documents"], manifest["tokens"], manifest["vocab_size"])

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted build left
    partial.mkdir(parents=True)
    try:
        dataset = _write(partial, documents, vocab_size, made_from, say)
        os.rename(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Dataset(directory, dataset.documents, dataset.tokens, dataset.vocab_size)


def _write(
    directory: Path, documents: list[str], vocab_size: int, made_from: dict, say: Callable[[str], None]
) -> Dataset:
    """Fills `directory` with a data set of `documents`, and makes sure that it has reached the disk."""
    say(f"training a SentencePiece tokenizer of {vocab_size} tokens on {len(documents)} files")
    model = train_tokenizer(documents, vocab_size)
    (directory / "tokenizer.model").write_bytes(model)
    say("writing the token ids in Megatron's indexed format")
    tokens = write_indexed(documents, model, directory / "corpus")
    dataset = Dataset(directory, len(documents), tokens, vocab_size)
    counts = {key: value for key, value in asdict(dataset).items() if key != "directory"}
    (directory / MANIFEST).write_text(json.dumps({"made_from": made_from, **counts}, indent=1) + "\n")
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    say(f"{tokens:,} tokens in {len(documents)} documents")
    return dataset
