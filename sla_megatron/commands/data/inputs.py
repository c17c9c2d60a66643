"""The flags that say where text is, and the sources that they mean."""

from __future__ import annotations

import argparse
import glob
import itertools
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import first_line
from ...common.replacing import file_identity
from .blocks import Block, Cut
from .documents import Document, Fault, read_documents
from .errors import DataError
from .manifests import made_by_sla_data
from .sources import COMPRESSIONS, Source, Table, TextFile

FORMATS = ("jsonl", "text", "document", "parquet")
_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".parquet": "parquet"}
_MB = 10**6


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """``--input``, ``--dataset`` and how documents lie in them."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files, patterns or folders: JSON lines (.jsonl .json .ndjson), text (.txt), either with .gz .zst .bz2 "
        "after it, or .parquet; in this order, the files of a pattern or folder by name",
    )
    group.add_argument(
        "--dataset", metavar="NAME", help="in place of files: the Hub's name of a data set, or a saved one"
    )
    group.add_argument("--dataset-config", metavar="NAME")
    group.add_argument("--dataset-split", metavar="NAME", default="train", help="default train")
    group.add_argument("--dataset-revision", metavar="NAME")
    group.add_argument("--streaming", action="store_true", help="read a Hub data set without storing it")
    group.add_argument(
        "--format",
        choices=FORMATS,
        help="of --input, where the names do not tell; text: a document a line, document: a document a file",
    )
    group.add_argument("--field", default="text", help="key or column that holds the text; default text")
    group.add_argument(
        "--max-document-mb", type=megabytes, default=64 * _MB, metavar="MB", help="larger ones are faults; default 64"
    )
    group.add_argument(
        "--shard-mb", type=megabytes, default=16 * _MB, metavar="MB", help="text in one shard; default 16"
    )


def megabytes(text: str) -> int:
    """A flag's megabytes as bytes."""
    size = float(text) if text.replace(".", "", 1).isdecimal() else 0
    if round(size * _MB) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected megabytes greater than 0")
    return round(size * _MB)


@dataclass(frozen=True)
class Inputs:
    """All of the text of a job, in order.

    ``block_bytes`` is about how much text a block has, ``limit`` the most bytes that a document may have.
    """

    sources: list[Source]
    field: str
    block_bytes: int
    limit: int

    @property
    def unit(self) -> str:
        """Of :attr:`work`: B, or rows of a data set."""
        return self.sources[0].unit

    @property
    def work(self) -> float | None:
        """The sum over the sources, None if one is unknown."""
        works = [source.work for source in self.sources]
        return None if None in works else sum(works)

    def identity(self) -> dict[str, Any]:
        """What the blocks depend on; JSON can hold it."""
        sources = [{**source.identity(), "kind": source.kind} for source in self.sources]
        return {"sources": sources, "field": self.field, "shard_bytes": self.block_bytes, "max_bytes": self.limit}

    def files(self) -> list[Path]:
        """All files that are read, as far as they are on this machine and known by name."""
        files = []
        for source in self.sources:
            path = Path(source.identity().get("dataset") or source.name)
            files += [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        return files

    def blocks(self, number: int = 0, source: int = 0, start: int = 0, done: float = 0) -> Iterator[Block]:
        """The blocks from ``number`` on, which begins at ``start`` of ``source``, of whose work ``done`` is done."""
        for index in range(source, len(self.sources)):
            cuts = self.sources[index].cuts(start, self.block_bytes, self.limit)
            for (cut, behind), last in _with_last(cuts):
                yield Block(number, index, cut.start, cut.end, cut.payload, last, behind - done, cut.too_large)
                number, done = number + 1, behind
            start, done = 0, 0

    def documents(self, block: Block) -> Iterator[Document | Fault]:
        """What is in ``block``, in order."""
        if block.payload is None:
            yield Fault(1, "too-large", f"{block.too_large} bytes")
            return
        kind = self.sources[block.source].kind
        yield from read_documents(block.payload, kind, self.field, self.limit, first=block.start == 0)


def _with_last(cuts: Iterator[tuple[Cut, float]]) -> Iterator[tuple[tuple[Cut, float], bool]]:
    """Each item with whether it is the last, which takes one item more in memory."""
    previous = next(cuts, None)
    for item in itertools.chain(cuts, [None]):
        if previous is not None:
            yield previous, item is None
        previous = item


def inputs_from_args(args: Namespace) -> Inputs:
    """The sources that the flags mean; ``DataError`` for what is not there or cannot be told."""
    if bool(args.input) == bool(args.dataset):
        raise DataError("--input and --dataset: expected one of them")
    if args.streaming and not args.dataset:
        raise DataError("--streaming: expected with --dataset; files are always streamed")
    return named_inputs(args, None if args.dataset else _files(args.input))


def named_inputs(args: Namespace, files: Iterable[Path] | None) -> Inputs:
    """The sources ``files`` as they are named, or where there are none ``--dataset``, read as the flags say."""
    sources = [_dataset(args)] if files is None else [_file(path, args) for path in files]
    return Inputs(sources, args.field, args.shard_mb, args.max_document_mb)


def _files(given: list[str]) -> list[Path]:
    files: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            found = sorted(_text_files(path))
        elif path.exists():
            found = [path]
        else:
            matches = (Path(match) for match in glob.glob(name, recursive=True) if os.path.isfile(match))
            found = sorted(match for match in matches if not made_by_sla_data(match.absolute()))
        if not found:
            raise DataError(f"--input {name}: expected files of text: {', '.join(_SUFFIXES)}")
        files += found
    _require_each_once(files)
    return files


def _text_files(folder: Path) -> Iterator[Path]:
    """The files in ``folder`` whose names say that they hold text; hidden ones are copies and caches."""
    hidden = []
    for path in folder.rglob("*"):
        if not (path.is_file() and _format(path)) or made_by_sla_data(path.absolute()):
            continue
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            hidden.append(path)
        else:
            yield path
    if hidden:
        more = f" and {len(hidden) - 1} more" if len(hidden) > 1 else ""
        print(f"sla-data: --input {folder}: hidden, and left out: {min(hidden)}{more}", file=sys.stderr)


def _require_each_once(files: list[Path]) -> None:
    """Raise ``DataError`` for a file that is there twice, by two names, or compressed beside itself."""
    seen: dict[Any, Path] = {}
    for path in files:
        name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSIONS else path.name
        uncompressed = (file_identity(path.parent), name)
        for what, key in (("the same file as", file_identity(path)), ("the same text as", uncompressed)):
            before = seen.setdefault(key, path)
            if before is not path:
                raise DataError(f"--input {path}: expected each file once, it is {what} {before}")


def _format(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def _file(path: Path, args: Namespace) -> Source:
    kind = args.format or _format(path)
    if kind is None:
        raise DataError(f"--input {path}: its name does not tell what it is: expected --format {{{','.join(FORMATS)}}}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"--input {path}: {error.strerror}") from error
    return _parquet(path, args.field) if kind == "parquet" else TextFile(path, kind)


def _parquet(path: Path, field: str) -> Table:
    import datasets
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows, columns = file.metadata.num_rows, file.schema_arrow.names
    except (ArrowException, OSError) as error:
        raise DataError(f"--input {path}: {first_line(error)}") from error
    if field not in columns:
        raise DataError(f"--field {field}: {path} has the columns {', '.join(columns)}")
    status = path.stat()
    described = {"file": str(path.absolute()), "bytes": status.st_size, "modified_ns": status.st_mtime_ns, "rows": rows}
    data = datasets.load_dataset(
        "parquet", data_files=[glob.escape(str(path))], split="train", streaming=True, columns=[field]
    )
    return Table(str(path), data, field, float(status.st_size), "B", described)


def _dataset(args: Namespace) -> Table:
    import datasets

    split, config = args.dataset_split, args.dataset_config
    name = args.dataset + (f" {config}" if config else "") + f" {split}"
    try:
        if os.path.isfile(os.path.join(args.dataset, "dataset_dict.json")):
            data = datasets.load_from_disk(os.path.join(args.dataset, split))
        elif os.path.isfile(os.path.join(args.dataset, "state.json")):
            data = datasets.load_from_disk(args.dataset)
        else:
            data = datasets.load_dataset(
                args.dataset, config, split=split, streaming=args.streaming, revision=args.dataset_revision
            )
    except Exception as error:  # The library's, the Hub's or the network's.
        script = "scripts are no longer supported" in str(error)
        hint = ": expected --dataset-revision refs/convert/parquet, the Hub's own conversion" if script else ""
        raise DataError(f"--dataset {name}: {first_line(error)}{hint}") from error
    columns = data.column_names
    if columns is not None and args.field not in columns:
        raise DataError(f"--field {args.field}: {name} has the columns {', '.join(columns)}")
    rows = None if args.streaming else len(data)
    described = {
        "dataset": args.dataset,
        "config": config,
        "split": split,
        "revision": args.dataset_revision,
        "rows": rows,
        # Of the data on this machine; a streamed one has none.
        "fingerprint": None if args.streaming else getattr(data, "_fingerprint", None),
    }
    return Table(name, data.select_columns([args.field]), args.field, rows, "rows", described)
