"""A data set in Megatron's indexed format, written without Megatron, which takes seconds to import."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy

from sla_megatron.commands.data.inspection import MAGIC, VERSION

_UINT16 = 8


def write_indexed(
    prefix: Path, documents: int = 40, length: int = 25, vocabulary: int = 100, end: int | None = None
) -> str:
    """``documents`` of one sequence of ``length`` random uint16 ids each, the last one ``end``; returns the prefix."""
    ids = numpy.random.default_rng(0).integers(0, vocabulary, documents * length).astype(numpy.uint16)
    if end is not None:
        ids[length - 1 :: length] = end
    Path(f"{prefix}.bin").write_bytes(ids.tobytes())
    parts = [
        struct.pack("<9sQBQQ", MAGIC, VERSION, _UINT16, documents, documents + 1),
        numpy.full(documents, length, "<i4").tobytes(),
        (2 * length * numpy.arange(documents)).astype("<i8").tobytes(),
        numpy.arange(documents + 1).astype("<i8").tobytes(),
    ]
    Path(f"{prefix}.idx").write_bytes(b"".join(parts))
    return str(prefix)
