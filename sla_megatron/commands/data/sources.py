"""Where text comes from: files of lines, whole files, and what the ``datasets`` library reads.

``datasets`` turns JSON lines into tables a block at a time and stops at the first malformed line without its number, so
that lines are read here; pyarrow, which it is built on, decompresses them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...common.errors import first_line
from .blocks import Cut, cut_lines, cut_whole
from .errors import DataError, file_errors

if TYPE_CHECKING:
    import pyarrow

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_ROWS = 64


class Source(Protocol):
    """One file, or one data set.

    ``name`` is what messages call it, ``kind`` how documents lie in its blocks (see ``documents.py``), ``work`` its
    share of the whole job in ``unit``s, None if unknown.
    """

    name: str
    kind: str
    work: float | None
    unit: str

    def identity(self) -> dict[str, Any]:
        """What must be the same for finished work to count."""

    def cuts(self, start: int, block_bytes: int, limit: int, end: int | None = None) -> Iterator[tuple[Cut, float]]:
        """Cuts from position ``start`` on, up to ``end``, each with how much of ``work`` is behind its end."""

    def borders(self, pieces: int) -> list[int]:
        """Beginnings of documents that part it into at most so many pieces of about one size.

        None where it can be read from its beginning alone.
        """


@dataclass(frozen=True)
class TextFile:
    """A file of JSON lines (``kind`` jsonl), of lines of text (text), or one document (document); may be compressed."""

    path: Path
    kind: str

    unit = "B"

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def work(self) -> float:
        return self.path.stat().st_size

    def identity(self) -> dict[str, Any]:
        status = self.path.stat()
        return {"file": str(self.path.absolute()), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}

    def cuts(self, start: int, block_bytes: int, limit: int, end: int | None = None) -> Iterator[tuple[Cut, float]]:
        with file_errors(self.name), self.path.open("rb") as file, self._text(file, start) as read:
            if end is not None:
                read = _first_bytes(read, end - start)
            if self.kind == "document":
                cuts = cut_whole(read, limit, start)
            else:
                cuts = cut_lines(read, block_bytes, limit, start)
            for cut in cuts:
                yield cut, float(file.tell())

    def borders(self, pieces: int) -> list[int]:
        if self.kind == "document" or self.path.suffix in COMPRESSIONS:
            return []
        found = set()
        with file_errors(self.name), self.path.open("rb") as file:
            size = int(self.work)
            for piece in range(1, pieces):
                # A line that begins at that very place is behind a line end.
                file.seek(max(size * piece // pieces, 1) - 1)
                while (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
                    pass
                found.add(file.tell())
        return sorted(found - {size})

    @contextmanager
    def _text(self, file: io.BufferedReader, start: int) -> Iterator[Callable[[int], bytes]]:
        """A function that reads the decompressed file from byte ``start`` on."""
        codec = COMPRESSIONS.get(self.path.suffix)
        if codec is None:
            file.seek(start)
            yield file.read
            return
        if not self.work:
            yield lambda size: b""
            return
        import pyarrow

        with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), codec) as stream:
            left = start
            while left and (chunk := stream.read(min(left, 1 << 20))):
                left -= len(chunk)
            yield stream.read


def _first_bytes(read: Callable[[int], bytes], left: int) -> Callable[[int], bytes]:
    """``read``, which comes to its end after ``left`` bytes."""

    def bounded(size: int) -> bytes:
        nonlocal left
        chunk = read(min(size, left))
        left -= len(chunk)
        return chunk

    return bounded


@dataclass(frozen=True)
class Table:
    """One text column of a data set of the ``datasets`` library, read as Arrow tables.

    ``data`` is a ``datasets.Dataset`` (memory-mapped) or an ``IterableDataset`` (streamed).
    """

    name: str
    data: Any
    column: str
    work: float | None
    unit: str
    described: dict[str, Any]

    kind = "rows"

    def identity(self) -> dict[str, Any]:
        return self.described

    def cuts(self, start: int, block_bytes: int, limit: int, end: int | None = None) -> Iterator[tuple[Cut, float]]:
        import pyarrow.compute

        del limit  # Rows are in memory when they are first seen.
        if self.described.get("rows") == 0:  # The library refuses a Parquet file without rows.
            return
        data = self.data.with_format("arrow")
        if end is not None:
            data = data.take(end)
        if start:
            data = data.skip(start)
        batches, rows, size = [], 0, 0
        with self._errors():
            for table in data.iter(batch_size=_ROWS):
                column = self._binary(table)
                batches += column.chunks
                rows += len(column)
                size += pyarrow.compute.sum(pyarrow.compute.binary_length(column)).as_py() or 0
                if size >= block_bytes:
                    yield Cut(start, start + rows, _packed(batches)), self._done(start + rows)
                    start, batches, rows, size = start + rows, [], 0, 0
            if rows:
                yield Cut(start, start + rows, _packed(batches)), self._done(start + rows)

    def borders(self, pieces: int) -> list[int]:
        import datasets

        # A streamed one reads what it skips.
        rows = self.described["rows"] if isinstance(self.data, datasets.Dataset) else 0
        return sorted({rows * piece // pieces for piece in range(1, pieces)} - {0, rows})

    def _done(self, rows: int) -> float:
        total = self.described.get("rows")
        return rows / total * self.work if self.work and total else float(rows)

    def _binary(self, table: pyarrow.Table) -> pyarrow.ChunkedArray:
        """The column's bytes: what claims to be UTF-8 need not be."""
        import pyarrow

        if self.column not in table.column_names:
            raise DataError(f"--field {self.column}: {self.name} has the columns {', '.join(table.column_names)}")
        column = table[self.column]
        kind = column.type
        if pyarrow.types.is_string_view(kind):
            column = column.cast(pyarrow.large_string())
        elif not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"--field {self.column}: {self.name} holds {kind} there: expected text")
        return column.cast(pyarrow.large_binary())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # The library's, Arrow's, the file system's or the network's.
            raise DataError(f"{self.name} cannot be read: {first_line(error)}") from error


def _packed(batches: list[pyarrow.Array]) -> bytes:
    """Arrays of large binaries as one Arrow stream."""
    import pyarrow

    column = pyarrow.concat_arrays(batches)
    batch = pyarrow.record_batch([column], names=["text"])
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


@dataclass(frozen=True)
class Piece:
    """What of ``source`` lies between two positions, both borders of it; its work is counted in positions."""

    source: Source
    start: int
    end: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def kind(self) -> str:
        return self.source.kind

    @property
    def unit(self) -> str:
        return self.source.unit

    @property
    def work(self) -> float:
        return self.end - self.start

    def identity(self) -> dict[str, Any]:
        return self.source.identity()

    def cuts(self, start: int, block_bytes: int, limit: int) -> Iterator[tuple[Cut, float]]:
        for cut, behind in self.source.cuts(max(start, self.start), block_bytes, limit, self.end):
            yield cut, behind - self.start


def without_data(source: Source) -> Source:
    """What a worker, which is handed blocks, needs of it: data sets need not travel."""
    if isinstance(source, Piece):
        return replace(source, source=without_data(source.source))
    return replace(source, data=None) if isinstance(source, Table) else source
