"""Data in Megatron's indexed format, small enough to know what is in them, and ``sla-data inspect`` on them."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy

from sla_megatron.commands.data.inspect_command import add_command
from sla_megatron.commands.data.inspection import index_faults, layout_fault, open_index
from sla_megatron.commands.data.training_tokenizer import EOS_ID, ModelSettings
from sla_megatron.commands.data.training_tokenizer import train_model as train_sentencepiece

TEXTS = ["Hello, World!\n  two lines\n", "naïve café 中文 😀😀😀", "\x1b[31mred\x1b[0m\ttab", "x" * 3000]

#: A document is a list of sequences, a sequence a list of ids.
Documents = list[list[list[int]]]


def write(prefix: Path, documents: Documents, dtype: type = numpy.uint16, multimodal: bool = False) -> str:
    """``documents`` written by Megatron's own builder; returns the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for document in documents:
        ids = [token for sequence in document for token in sequence]
        modes = [0] * len(document) if multimodal else None
        builder.add_document(numpy.array(ids, dtype), [len(sequence) for sequence in document], modes)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def random_documents(count: int = 50, sequences: int = 3, vocabulary: int = 1000, seed: int = 0) -> Documents:
    source = numpy.random.default_rng(seed)
    return [
        [
            source.integers(0, vocabulary, int(length)).tolist()
            for length in source.integers(1, 40, source.integers(1, sequences + 1))
        ]
        for _ in range(count)
    ]


def lengths_of(documents: Documents) -> numpy.ndarray:
    return numpy.array([sum(map(len, document)) for document in documents], numpy.int64)


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="sla-data")
    add_command(parser.add_subparsers(required=True))
    args = parser.parse_args(["inspect", *map(str, arguments)])
    return args.command(args)


def faults_of(prefix: str) -> list[str]:
    index = open_index(prefix)
    fault = layout_fault(index)
    return index_faults(index) if fault is None else [fault]


def train_model(path: Path) -> Path:
    """A small sentencepiece model in ``path`` that gives back any text."""
    documents = [Path(__file__).read_text(encoding="utf-8"), *TEXTS]
    path.write_bytes(train_sentencepiece([text.encode() for text in documents], ModelSettings(400)))
    return path


def encoded(model: Path, texts: list[str] = TEXTS) -> Documents:
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return [[[*tokenizer.encode(text), EOS_ID]] for text in texts]


def flags(model: Path) -> tuple[str, ...]:
    return "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)


def five_sequences(prefix: Path) -> str:
    """3 documents of the sequences (0, 1), (2), (3, 4), each of 4 tokens in 2 bytes."""
    sequences = numpy.arange(20).reshape(5, 4).tolist()
    return write(prefix, [sequences[:2], sequences[2:3], sequences[3:]])
