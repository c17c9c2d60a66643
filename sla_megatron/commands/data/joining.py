"""What ``sla-data merge`` does: finished data sets, in the order given, to one."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...common.files import write_json
from ...common.replacing import file_identity
from ...common.splits import split_hint
from ...common.tokenizers import tokenizer_name
from .errors import DataError, file_errors
from .inspection import open_sound_index
from .known_tokenizer import Manifest, find_manifest
from .merging import IndexedWriter, Part
from .progress import waiting_for
from .workdir import Workdir


def join(prefixes: Sequence[Path], out: Path, overwrite: bool) -> int:
    """The data sets ``prefixes``, in their order, as ``out``; says what was done, and returns the exit status.

    Raises:
        DataError: with one line, for what cannot be joined.
    """
    if not out.name:
        raise DataError(f"--output-prefix {out}: expected a name, such as data/corpus")
    files = _files(prefixes)
    workdir = Workdir(out, (out,))
    workdir.require_no_input(files)
    found = [find_manifest(str(prefix)) for prefix in prefixes]
    known = _require_one_tokenizer(prefixes, found)
    settings = _settings(files, known)
    with workdir.held():
        if not overwrite and workdir.finished(settings) is not None:
            workdir.remove_work()
            print(f"{workdir.manifest}: nothing to do")
            return 0
        workdir.begin(settings, overwrite)
        try:
            dtype = open_sound_index(str(prefixes[0])).dtype
            with file_errors(f"--output-prefix {out}"), IndexedWriter(out, dtype, workdir.merged) as writer:
                with waiting_for("merging", quick=True):
                    for prefix in prefixes:
                        writer.add(Part(prefix))
                    writer.finish()
                workdir.make_room()
                writer.put()
            counts = {"documents": writer.documents, "tokens": writer.tokens}
            made = {"tokenizer": settings["tokenizer"], "append_eod": all(one and one.append_eod for one in found)}
            outputs = {"outputs": {"all": {"prefix": out.name, **counts}}}
            write_json(workdir.manifest, {"settings": settings, **made, **counts, **outputs})
        finally:
            workdir.remove_work()
    print(f"{out}: {writer.documents:,} documents, {writer.tokens:,} tokens")
    for note in _notes(prefixes, found):
        print(f"sla-data: {note}", file=sys.stderr)
    if hint := split_hint(writer.documents):
        print(f"sla-data: {out}: {hint}", file=sys.stderr)
    return 0


def _files(prefixes: Sequence[Path]) -> list[Path]:
    """The files of the data sets.  Raises ``DataError`` for one that is not there."""
    files = [Path(f"{prefix}{suffix}") for prefix in prefixes for suffix in (".bin", ".idx")]
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: expected a file")
    return files


def _notes(prefixes: Sequence[Path], found: Sequence[Manifest | None]) -> Iterator[str]:
    """What is allowed, and may not have been meant."""
    seen: dict[Any, Path] = {}
    for prefix in prefixes:
        if (before := seen.setdefault(file_identity(Path(f"{prefix}.bin")), prefix)) is not prefix:
            yield f"{prefix} is the same data set as {before}: its documents are there twice"
    if unknown := [str(prefix) for prefix, one in zip(prefixes, found, strict=True) if not (one and one.identity)]:
        yield f"no manifest says which tokenizer made {', '.join(unknown)}"


def _require_one_tokenizer(prefixes: Sequence[Path], found: Sequence[Manifest | None]) -> Manifest | None:
    """The first manifest that names a tokenizer; ``DataError`` if another names another."""
    known = [(prefix, one) for prefix, one in zip(prefixes, found, strict=True) if one and one.identity]
    for prefix, one in known[1:]:
        if one.identity != known[0][1].identity:
            names = [tokenizer_name(Namespace(**manifest.tokenizer)) for manifest in (known[0][1], one)]
            raise DataError(
                f"{prefix} was made with {names[1]}, {known[0][0]} with {names[0]}"
                f"{', whose files are others' if names[0] == names[1] else ''}: expected data sets of one tokenizer"
            )
    return known[0][1] if known else None


def _settings(files: Sequence[Path], known: Manifest | None) -> dict[str, Any]:
    """What the output depends on; JSON can hold it."""
    described = [
        {"file": str(path.absolute()), "bytes": path.stat().st_size, "modified_ns": path.stat().st_mtime_ns}
        for path in files
    ]
    return {
        "inputs": {"merged": described},
        "tokenizer": known.tokenizer if known else None,
        "tokenizer_files": known.files if known else {},
    }
