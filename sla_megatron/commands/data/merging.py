"""Finished shards, or finished data sets, to one data set or one for each split."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy

from ...common.files import flush
from .errors import DataError, file_errors
from .index_format import header
from .inspection import open_sound_index

_COPY = 1 << 24


@dataclass(frozen=True)
class Part:
    """Documents to be copied from one data set: those with ``keep`` (``[documents]`` of bool), or all of them."""

    prefix: Path
    keep: numpy.ndarray | None = None


class IndexedWriter:
    """One ``.bin`` and ``.idx``, made of parts of others, byte for byte as ``IndexedDatasetBuilder`` makes them.

    Upstream's builder (``megatron/core/datasets/indexed_dataset.py``) keeps each document's length and end, and at last
    each pointer, in Python lists: over a hundred bytes a document.  Here they go to files as they come.  Until
    :meth:`put` they are in ``folder``, on the same file system.
    """

    def __init__(self, prefix: Path, dtype: numpy.dtype, folder: Path) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.documents = self.sequences = self.tokens = 0
        names = ("bin", "lengths", "pointers", "ends", "idx")
        self._paths = {name: folder / f"{prefix.name}.{name}" for name in names}
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> IndexedWriter:
        with file_errors(str(self.prefix)), ExitStack() as stack:
            self._files = {name: stack.enter_context(path.open("wb")) for name, path in self._paths.items()}
            self._stack = stack.pop_all()
        _append(self._files["ends"], numpy.array([0], numpy.int64))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def add(self, part: Part) -> None:
        """Copy a part's documents, in their order."""
        lengths, ends = _index(part.prefix, self.dtype)
        offsets = numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)])
        itemsize = self.dtype.itemsize
        with Path(f"{part.prefix}.bin").open("rb") as source:
            # Documents to keep as runs of neighbours, from the first of each to before the one after its last.
            for first, after in _runs(part.keep, len(ends) - 1):
                low, high = ends[first], ends[after]
                size = int(offsets[high] - offsets[low])
                _copy(source, self._files["bin"], int(offsets[low]) * itemsize, size * itemsize)
                moved = self.tokens - offsets[low]
                _append(self._files["lengths"], lengths[low:high])
                _append(self._files["pointers"], (offsets[low:high] + moved) * itemsize)
                _append(self._files["ends"], ends[first + 1 : after + 1] - low + self.sequences)
                self.documents += after - first
                self.sequences += int(high - low)
                self.tokens += size

    def finish(self) -> None:
        """Put the index together, and have both files on the disk."""
        index = self._files["idx"]
        index.write(header(self.dtype, self.sequences, self.documents))
        for file in self._files.values():
            file.flush()
        for name in ("lengths", "pointers", "ends"):
            with self._paths[name].open("rb") as file:
                shutil.copyfileobj(file, index, _COPY)
        index.flush()
        for name in ("bin", "idx"):
            flush(self._paths[name])

    def put(self) -> None:
        """Give both files their names, the index last."""
        for name in ("bin", "idx"):
            self._paths[name].replace(f"{self.prefix}.{name}")


def _append(file: BinaryIO, values: numpy.ndarray) -> None:
    file.write(values.tobytes())


def _index(prefix: Path, dtype: numpy.dtype) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Tokens of each sequence, and the sequences at which documents end, from 0 on."""
    index = open_sound_index(str(prefix))
    if not index.bin_bytes:  # Of no documents, whatever the type.
        return numpy.zeros(0, numpy.int32), numpy.zeros(1, numpy.int64)
    if index.dtype != dtype:
        raise DataError(f"{prefix} holds {index.dtype}: expected {dtype}, as the first has")
    return numpy.array(index.mapped(index.lengths)), numpy.array(index.mapped(index.document_indices))


def _runs(keep: numpy.ndarray | None, documents: int) -> Iterator[tuple[int, int]]:
    if keep is None:
        keep = numpy.ones(documents, bool)
    edges = numpy.flatnonzero(numpy.diff(keep.astype(numpy.int8), prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _copy(source: BinaryIO, target: BinaryIO, start: int, size: int) -> None:
    source.seek(start)
    while size:
        chunk = source.read(min(size, _COPY))
        if not chunk:
            raise OSError(f"{source.name} ends too early")
        target.write(chunk)
        size -= len(chunk)


def split_of(digests: numpy.ndarray, weights: list[float]) -> numpy.ndarray:
    """Which split each document belongs to, by its hash alone: equal texts never part.

    Args:
        digests: ``[documents, 2]``, 64-bit halves of the hashes.
        weights: of the splits, any positive scale.
    """
    borders = numpy.cumsum(weights)[:-1] / sum(weights)
    # The upper 53 bits make an exact fraction.
    return numpy.searchsorted(borders, (digests[:, 0] >> numpy.uint64(11)) * 2.0**-53, side="right")


def first_occurrences(digests: numpy.ndarray) -> numpy.ndarray:
    """Whether each row ``[documents, 2]`` is the first of its value: ``[documents]`` of bool."""
    order = numpy.lexsort((digests[:, 1], digests[:, 0]))  # Stable: equal hashes stay in their order.
    ordered = digests[order]
    fresh = numpy.ones(len(digests), bool)
    fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = numpy.zeros(len(digests), bool)
    first[order] = fresh
    return first
