"""What data in Megatron's indexed format holds: its documents' lengths and ends, and its token ids.

Every function takes an index in which :mod:`.inspection` found no fault, and reads in pieces, as that module does.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy

from .inspection import Index, first_true

#: How many bytes of tokens are in memory at once.
CHUNK_BYTES = 1 << 23
#: How many documents' last tokens are looked up at once; in long documents each is on a page of its own.
DOCUMENTS = 1 << 16
#: Token ids below this are counted; no vocabulary is larger.
_COUNTED_IDS = 1 << 24


@dataclass(frozen=True)
class Lengths:
    """How many documents have which length in tokens, exactly: there are few different ones."""

    values: numpy.ndarray
    counts: numpy.ndarray

    @property
    def documents(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return float(self.values @ self.counts) / self.documents

    def percentile(self, percent: float) -> int:
        """The least length that at least ``percent`` % of the documents do not exceed."""
        rank = numpy.ceil(percent / 100 * self.documents)
        return int(self.values[numpy.searchsorted(numpy.cumsum(self.counts), max(rank, 1))])


@dataclass(frozen=True)
class Documents:
    """What the documents are like.

    Attributes:
        lengths: of all documents.
        ended: how many end with the end-of-document token.
        not_ended: the first one that has tokens and does not.
    """

    lengths: Lengths
    ended: int | None
    not_ended: int | None


def document_figures(
    index: Index, eod: int | None = None, read: Callable[[int], Any] = lambda count: None
) -> Documents:
    """Lengths of the documents, and how they end.

    Args:
        eod: the end-of-document token; without it ``.bin``, of which this reads almost every page, is left alone.
        read: called with each further number of bytes of ``.bin`` that are done with.
    """
    values = counts = numpy.zeros(0, numpy.int64)
    ended, not_ended = 0, None
    for first in range(0, index.documents, DOCUMENTS):
        bounds = _bounds(index, first, min(DOCUMENTS, index.documents - first))
        lengths = numpy.diff(bounds)
        values, inverse = numpy.unique(numpy.concatenate((values, lengths)), return_inverse=True)
        counts = numpy.bincount(inverse, numpy.concatenate((counts, numpy.ones_like(lengths)))).astype(numpy.int64)
        filled = numpy.flatnonzero(lengths)
        if eod is not None and filled.size:
            tokens = numpy.memmap(
                index.bin, index.dtype, "r", int(bounds[0]) * index.dtype.itemsize, (int(bounds[-1] - bounds[0]),)
            )
            ends = tokens[bounds[filled + 1] - 1 - bounds[0]] == eod
            ended += int(ends.sum())
            if not_ended is None and (at := first_true(~ends)) is not None:
                not_ended = first + int(filled[at])
            read(tokens.nbytes)
    return Documents(Lengths(values, counts), None if eod is None else ended, not_ended)


def _bounds(index: Index, first: int, count: int) -> numpy.ndarray:
    """Where ``count`` documents from ``first`` on start, and where the last of them ends, in tokens."""
    at = index.mapped(index.document_indices, first, count + 1).astype(numpy.int64)
    bounds = numpy.full(count + 1, index.tokens, numpy.int64)
    inside = at < index.sequences
    if inside.any():
        at = at[inside]
        pointers = index.mapped(index.pointers, int(at[0]), int(at[-1] - at[0]) + 1)
        bounds[inside] = pointers[at - at[0]] // index.dtype.itemsize
    return bounds


@dataclass(frozen=True)
class EmptySequences:
    """How many sequences have no tokens, and the number of the first; none if there is none."""

    count: int
    first: int | None


def empty_sequences(index: Index) -> EmptySequences:
    """Sequences of length 0; Megatron accepts them."""
    count, first = 0, None
    for start, lengths in index.pieces(index.lengths):
        empty = lengths == 0
        if first is None and (at := first_true(empty)) is not None:
            first = start + at
        count += int(empty.sum())
    return EmptySequences(count, first)


@dataclass(frozen=True)
class Ids:
    """The token ids of ``.bin``.

    Attributes:
        least, greatest: of all ids.
        different: how many occur; None if some are far beyond any vocabulary.
        fault: the line about ids that cannot be.
    """

    least: int
    greatest: int
    different: int | None
    fault: str | None


def scan(index: Index, vocabulary: int | None, read: Callable[[int], Any] = lambda count: None) -> Ids:
    """Read all of ``.bin``, of at least one token.

    Args:
        vocabulary: how many tokens the tokenizer has, if that is known.
        read: called with each further number of bytes that were read.
    """
    size = CHUNK_BYTES // index.dtype.itemsize
    least, greatest, bad, where = None, None, 0, None
    seen: numpy.ndarray | None = numpy.zeros(0, bool)
    for first in range(0, index.tokens, size):
        offset, count = first * index.dtype.itemsize, min(size, index.tokens - first)
        ids = numpy.memmap(index.bin, index.dtype, "r", offset, (count,))
        low, high = int(ids.min()), int(ids.max())
        least, greatest = min(low, low if least is None else least), max(high, high if greatest is None else greatest)
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            wrong = (ids < 0) | (ids >= (high + 1 if vocabulary is None else vocabulary))
            bad += int(wrong.sum())
            if where is None:
                at = first_true(wrong)
                where = f"{_place(index, first + at)}: id {ids[at]}"
        seen = _seen(seen, ids, low, high)
        read(ids.nbytes)
    fault = None
    if where is not None:
        fault = f"{index.bin}: {where}, expected 0 or more"
        fault += "" if vocabulary is None else f" and less than {vocabulary}, the size of the vocabulary"
        fault += f" ({bad} such tokens)" if bad > 1 else ""
    return Ids(least, greatest, None if seen is None else int(seen.sum()), fault)


def _seen(seen: numpy.ndarray | None, ids: numpy.ndarray, low: int, high: int) -> numpy.ndarray | None:
    """``seen``, which says of each id whether it occurs, with ``ids`` too."""
    if seen is None or low < 0 or high >= _COUNTED_IDS:
        return None
    if high >= seen.size:
        seen = numpy.concatenate((seen, numpy.zeros(high + 1 - seen.size, bool)))
    seen[ids] = True
    return seen


def _place(index: Index, token: int) -> str:
    """``document 3, token 17``, both counted from 0."""
    pointer = token * index.dtype.itemsize
    # numpy's own search would copy the whole array, since it is not aligned in the file.
    pointers = index.mapped(index.pointers)
    sequence = bisect.bisect_right(pointers, pointer) - 1
    document = bisect.bisect_right(index.mapped(index.document_indices), sequence) - 1
    start = index.mapped(index.document_indices, document, 1)[0]
    return f"document {document}, token {(pointer - int(pointers[start])) // index.dtype.itemsize}"
