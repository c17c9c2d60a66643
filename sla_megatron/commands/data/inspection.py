"""Megatron's indexed format, read without trusting it: what ``PREFIX.idx`` says, and whether ``PREFIX.bin`` agrees.

Everything is read in pieces, so that memory does not grow with the data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy

from .errors import DataError
from .index_format import DTYPES, HEADER, MAGIC, VERSION

#: How many entries of the index are in memory at once.
ENTRIES = 1 << 20


@dataclass(frozen=True)
class Part:
    """One of the arrays in ``.idx``."""

    name: str
    dtype: str
    offset: int
    count: int


@dataclass(frozen=True)
class Index:
    """The header of ``PREFIX.idx``, and the sizes of both files in bytes."""

    prefix: str
    version: int
    code: int
    sequences: int
    boundaries: int
    idx_bytes: int
    bin_bytes: int

    @property
    def idx(self) -> Path:
        return Path(f"{self.prefix}.idx")

    @property
    def bin(self) -> Path:
        return Path(f"{self.prefix}.bin")

    @property
    def documents(self) -> int:
        """How many there are by the header; document indices are one more."""
        return max(self.boundaries - 1, 0)

    @cached_property
    def dtype(self) -> numpy.dtype:
        return numpy.dtype(DTYPES[self.code])

    @property
    def tokens(self) -> int:
        """How many ids ``.bin`` holds."""
        return self.bin_bytes // self.dtype.itemsize

    @property
    def lengths(self) -> Part:
        return Part("lengths", "<i4", HEADER.size, self.sequences)

    @property
    def pointers(self) -> Part:
        return Part("pointers", "<i8", HEADER.size + 4 * self.sequences, self.sequences)

    @property
    def document_indices(self) -> Part:
        return Part("document indices", "<i8", HEADER.size + 12 * self.sequences, self.boundaries)

    @property
    def has_modes(self) -> bool:
        """Whether the modes of multimodal data follow; Megatron's GPT data sets do not look at them."""
        return self.sequences > 0 and self.idx_bytes == self.expected_bytes + self.sequences

    @property
    def expected_bytes(self) -> int:
        """How long ``.idx`` is by its header, without modes."""
        return HEADER.size + 12 * self.sequences + 8 * self.boundaries

    def mapped(self, part: Part, first: int = 0, count: int | None = None) -> numpy.ndarray:
        """``part``, or ``count`` entries of it, mapped; at least one."""
        item = numpy.dtype(part.dtype).itemsize
        count = part.count - first if count is None else count
        return numpy.memmap(self.idx, part.dtype, "r", part.offset + first * item, (count,))

    def pieces(self, part: Part, size: int | None = None) -> Iterator[tuple[int, numpy.ndarray]]:
        """The entries of ``part``, ``size`` at a time: the number of the first, and int64."""
        size = size or ENTRIES
        for first in range(0, part.count, size):
            # Mapped anew each time: pages that were read do not stay with the process.
            yield first, self.mapped(part, first, min(size, part.count - first)).astype(numpy.int64)


def open_index(prefix: str) -> Index:
    """The header of ``prefix.idx``.

    Raises:
        DataError: if a file is missing or cannot be read, or the first is not an index.
    """
    try:
        with open(f"{prefix}.idx", "rb") as file:
            header = file.read(HEADER.size)
            idx_bytes = os.fstat(file.fileno()).st_size
        with open(f"{prefix}.bin", "rb") as file:
            bin_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        hint = "" if Path(prefix).suffix not in (".bin", ".idx") else ": expected PREFIX without .bin or .idx"
        raise DataError(f"{error.filename} cannot be read: {error.strerror}{hint}") from error
    if header[: len(MAGIC)] != MAGIC:
        raise DataError(f"{prefix}.idx is not an index of Megatron's: it starts with {header[:9]!r}, not {MAGIC!r}")
    if len(header) < HEADER.size:
        raise DataError(f"{prefix}.idx is cut off: {len(header)} bytes, a header has {HEADER.size}")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    return Index(prefix, version, code, sequences, boundaries, idx_bytes, bin_bytes)


def open_sound_index(prefix: str) -> Index:
    """:func:`open_index`, which also raises for a :func:`layout_fault`."""
    index = open_index(prefix)
    if (fault := layout_fault(index)) is not None:
        raise DataError(fault)
    return index


def layout_fault(index: Index) -> str | None:
    """Why the arrays of ``.idx`` cannot be told apart; None if they can."""
    if index.version != VERSION:
        return f"{index.idx}: version {index.version}, expected {VERSION}"
    if index.code not in DTYPES:
        return f"{index.idx}: dtype code {index.code}, expected one of {', '.join(map(str, DTYPES))}"
    if index.dtype.kind == "f":
        return f"{index.idx}: dtype {index.dtype}, expected whole numbers, as token ids are"
    if index.idx_bytes != index.expected_bytes and not index.has_modes:
        return (
            f"{index.idx}: {index.idx_bytes} bytes, expected {index.expected_bytes} "
            f"for {index.sequences} sequences and {index.boundaries} document indices"
        )
    return None


def index_faults(index: Index) -> list[str]:
    """What is wrong with the arrays of ``.idx``, and how they disagree with ``.bin``: a line for each check that fails.

    Args:
        index: one without a :func:`layout_fault`.
    """
    lengths, total = _length_faults(index)
    return [*lengths, *_document_faults(index), *_bin_faults(index, total)]


def _length_faults(index: Index) -> tuple[list[str], int]:
    """Of lengths and pointers; and how many bytes the lengths say ``.bin`` has."""
    negative = pointer = None
    end = 0
    for (first, lengths), (_, pointers) in zip(index.pieces(index.lengths), index.pieces(index.pointers), strict=True):
        sizes = lengths * index.dtype.itemsize
        expected = end + numpy.cumsum(sizes) - sizes
        end += int(sizes.sum())
        if negative is None and (at := first_true(lengths < 0)) is not None:
            negative = f"{index.idx}: sequence {first + at} has the length {lengths[at]}, expected none below 0"
        if pointer is None and (at := first_true(pointers != expected)) is not None:
            pointer = (
                f"{index.idx}: sequence {first + at} starts at byte {pointers[at]}, "
                f"expected {expected[at]} by the lengths before it"
            )
    return [fault for fault in (negative, pointer) if fault is not None], end


def _document_faults(index: Index) -> list[str]:
    if index.boundaries == 0:
        return [f"{index.idx}: no document indices, expected at least the first, 0"]
    faults = []
    before = None
    decreasing = None
    for first, ends in index.pieces(index.document_indices):
        if before is None and ends[0] != 0:
            faults.append(f"{index.idx}: the first document index is {ends[0]}, expected 0")
        earlier = numpy.concatenate((ends[:1] if before is None else [before], ends[:-1]))
        if decreasing is None and (at := first_true(ends < earlier)) is not None:
            decreasing = (
                f"{index.idx}: document index {first + at} is {ends[at]}, expected at least {earlier[at]}, "
                "the one before it"
            )
        before = ends[-1]
    if decreasing is not None:
        faults.append(decreasing)
    if before != index.sequences:
        faults.append(
            f"{index.idx}: the last document index is {before}, expected {index.sequences}, the number of sequences"
        )
    return faults


def _bin_faults(index: Index, total: int) -> list[str]:
    if index.bin_bytes != total:
        return [f"{index.bin}: {index.bin_bytes} bytes, expected {total} by the lengths in {index.idx.name}"]
    if total == 0:
        return [f"{index.bin}: no tokens, expected at least one: Megatron cannot open an empty file"]
    return []


def first_true(mask: numpy.ndarray) -> int | None:
    """The position of the first True in ``mask``, which has at least one entry; None if there is none."""
    at = int(mask.argmax())
    return at if mask[at] else None
