"""The numbers of Megatron's indexed format, written without Megatron, which takes seconds to import.

    .idx: magic, version, dtype code, how many sequences S, how many document indices D (34 bytes),
          S lengths (int32, tokens), S pointers (int64, bytes into .bin), D document indices (int64, sequences),
          and in multimodal data S modes (int8)
    .bin: the token ids of all sequences

The first document index is 0; each further one is where a document ends.  Upstream:
``megatron.core.datasets.indexed_dataset``.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
#: Megatron's numbers for numpy's types.
DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float32",
    8: "uint16",
}
HEADER = struct.Struct("<9sQBQQ")
#: Vocabularies below this have ids of 16 bits (``DType.optimal_dtype``).
_SMALL = 65500


def dtype_of(vocab_size: int) -> numpy.dtype:
    """The type in which Megatron stores the ids of ``vocab_size`` tokens."""
    return numpy.dtype(numpy.uint16 if vocab_size < _SMALL else numpy.int32)


def header(dtype: numpy.dtype, sequences: int, documents: int) -> bytes:
    """How ``.idx`` begins."""
    (code,) = (code for code, name in DTYPES.items() if name == dtype.name)
    return HEADER.pack(MAGIC, VERSION, code, sequences, documents + 1)


def write_index(path: Path, dtype: numpy.dtype, lengths: list[int]) -> None:
    """``.idx`` of documents of one sequence each, with these lengths in tokens."""
    ends = numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)])
    with path.open("wb") as file:
        file.write(header(dtype, len(lengths), len(lengths)))
        file.write(numpy.array(lengths, numpy.int32).tobytes())
        file.write((ends[:-1] * dtype.itemsize).tobytes())
        file.write(numpy.arange(len(lengths) + 1, dtype=numpy.int64).tobytes())
