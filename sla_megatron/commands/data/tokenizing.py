"""The whole job: text to one data set or one for each split, from wherever an earlier run of it stopped."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy

from ...common.files import flush, write_json, written_whole
from ...common.silence import without_announcements
from ...common.tokenizers import TOKENIZER_PATHS
from ...common.waiting import bar
from .blocks import Block
from .documents import FAULTS, fault_message
from .encoding import Encoder
from .errors import DataError, file_errors
from .index_format import dtype_of
from .inputs import Inputs
from .manifests import SPLITS
from .merging import IndexedWriter, Part, first_occurrences, split_of
from .plain_tokenizers import imported_for
from .progress import Progress, waiting_for
from .shards import (
    FatalFault,
    ShardRecord,
    ShardWriter,
    read_digests,
    read_faults,
    read_records,
    shard_prefix,
)
from .sources import Table
from .workdir import Workdir
from .workers import Team, ThisProcess

#: Libraries whose versions the ids depend on.
_LIBRARIES = ("megatron-core", "sentencepiece", "tokenizers", "transformers", "tiktoken")


@dataclass(frozen=True)
class Job:
    """What is to be made.

    Attributes:
        inputs: where text is.
        prefix: of the output: ``prefix.bin``, or ``prefix_train.bin`` and so on with a split.
        tokenizer: settings, as :func:`sla_megatron.common.tokenizers.tokenizer_settings` gives them.
        append_eod: whether documents end with the end-of-document token.
        split: weights of train, valid and test, or None for one data set.
        deduplicate: whether of equal texts only the first is kept.
        fatal: whether the first fault ends the job.
    """

    inputs: Inputs
    prefix: Path
    tokenizer: dict[str, Any]
    append_eod: bool = True
    split: tuple[float, ...] | None = None
    deduplicate: bool = False
    fatal: bool = True

    def outputs(self) -> dict[str, Path]:
        """Prefixes of the files by split; a single data set is ``all``."""
        if self.split is None:
            return {"all": self.prefix}
        named = zip(SPLITS, self.split, strict=False)
        return {name: self.prefix.with_name(f"{self.prefix.name}_{name}") for name, weight in named if weight}

    @property
    def workdir(self) -> Workdir:
        """Where its work is kept, and its results go."""
        return Workdir(self.prefix, tuple(self.outputs().values()))

    def settings(self) -> dict[str, Any]:
        """What the output depends on: with the same, work goes on; JSON can hold it."""
        versions = {name: importlib.metadata.version(name) for name in _LIBRARIES if _installed(name)}
        return {
            "inputs": self.inputs.identity(),
            "tokenizer": self.tokenizer,
            "tokenizer_files": _files_of(self.tokenizer),
            "append_eod": self.append_eod,
            "split": self.split,
            "deduplicate": self.deduplicate,
            "versions": versions,
        }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _files_of(tokenizer: dict[str, Any]) -> dict[str, str]:
    """Hashes of the tokenizer's files by name, where they are on this machine."""
    named = [tokenizer.get(key) for key in TOKENIZER_PATHS]
    paths = [Path(name) for name in named if name]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*")))]
    hashes = {}
    for file in files:
        # A Hugging Face folder may hold weights too.
        if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt", ".gguf", ".h5"):
            with file.open("rb") as opened:
                hashes[str(file)] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


def tokenize(job: Job, workers: int, overwrite: bool, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do the job, or what is left of it; returns the manifest, which then is ``prefix.json``.

    The files are the same for any number of workers, and however often the job was ended and begun again.

    Raises:
        DataError: with one line, for whatever ends the job; finished shards stay.
        TokenizerError: if the tokenizer cannot be built.
    """
    workdir = job.workdir
    with waiting_for("looking at the files", quick=True):
        settings = job.settings()
        workdir.require_no_input([*job.inputs.files(), *map(Path, settings["tokenizer_files"])])
    with workdir.held():
        manifest = None if overwrite else workdir.finished(settings)
        if manifest is not None:
            workdir.remove_work()
            say(f"{workdir.manifest}: nothing to do")
            return manifest
        with _workers(job, workers) as team:
            with waiting_for("loading the tokenizer"):
                vocab_size = team.vocab_size()
            if workdir.begin(settings, overwrite):
                say(f"going on in {workdir.folder}")
            with file_errors(f"{workdir.folder} (the same command goes on)"):
                records = _write_shards(job, workdir.shards, team)
        with file_errors(f"{workdir.folder} (the same command goes on)"):
            manifest = {"settings": settings, **_summary(job, records, vocab_size)}
            with waiting_for("merging", quick=True):
                manifest |= _merge(job, workdir, records, dtype_of(vocab_size))
                _write_faults(job, workdir, records)
            write_json(workdir.manifest, manifest)
        workdir.remove_work()
        return manifest


def _workers(job: Job, most: int) -> Team | ThisProcess:
    """Who turns blocks into shards; one worker is this process."""
    if most == 1:
        return ThisProcess(_prepare, (job,))
    # Workers are handed blocks: data sets need not travel to them.
    sources = [replace(source, data=None) if isinstance(source, Table) else source for source in job.inputs.sources]
    theirs = replace(job, inputs=replace(job.inputs, sources=sources))
    rows = ("pyarrow",) if any(source.kind == "rows" for source in sources) else ()
    return Team(most, _prepare, (theirs,), (imported_for(job.tokenizer), *rows))


def _write_shards(job: Job, folder: Path, team: Team | ThisProcess) -> list[ShardRecord]:
    """All shards, those that are finished as they are."""
    records = read_records(folder)
    for record in records.values():
        if job.fatal and record.faults:
            fault = FatalFault(record.number, record.source, read_faults(folder, record.number)[0])
            raise _fatal(job.inputs, records, fault)
    before = sum(record.work for record in records.values())
    with bar("tokenizing", job.inputs.work, job.inputs.unit, initial=before) as drawn:
        progress = Progress(drawn, records.values())
        try:
            for record in team.results(_blocks_left(job.inputs, records), progress):
                records[record.number] = record
                progress.add(record)
        except FatalFault as error:
            raise _fatal(job.inputs, records, error) from None
    return [records[number] for number in sorted(records)]


def _prepare(job: Job) -> ShardWriter:
    """What a worker needs."""
    with without_announcements():
        encoder = Encoder(job.tokenizer, job.append_eod)
    digests = job.split is not None or job.deduplicate
    return ShardWriter(job.workdir.shards, job.inputs, encoder, digests, job.fatal)


def _blocks_left(inputs: Inputs, records: dict[int, ShardRecord]) -> Iterator[Block]:
    """The blocks without a record, read from the end of the first run of finished ones on."""
    number = next(number for number in range(len(records) + 1) if number not in records)
    source = start = 0
    if number:
        before = records[number - 1]
        source, start = (before.source + 1, 0) if before.last else (before.source, before.end)
    done = sum(record.work for record in records.values() if record.source == source and record.number < number)
    for block in inputs.blocks(number, source, start, done):
        if block.number not in records:
            yield block


def _fatal(inputs: Inputs, records: dict[int, ShardRecord], error: FatalFault) -> DataError:
    fault = error.fault
    line = fault.line + sum(r.lines for r in records.values() if r.source == error.source and r.number < error.number)
    return DataError(fault_message(inputs.sources[error.source].name, line, fault) + ", which goes on from here")


def _summary(job: Job, records: list[ShardRecord], vocab_size: int) -> dict[str, Any]:
    faults = Counter()
    for record in records:
        faults.update(record.faults)
    return {
        "tokenizer": job.tokenizer,
        "vocab_size": vocab_size,
        "append_eod": job.append_eod,
        "documents": sum(record.documents for record in records),
        "tokens": sum(record.tokens for record in records),
        "text_bytes": sum(record.text_bytes for record in records),
        "lines": sum(record.lines for record in records),
        "blank_lines": sum(record.blank_lines for record in records),
        "faults": {kind: faults[kind] for kind in FAULTS if faults[kind]},
    }


def _merge(job: Job, workdir: Workdir, records: list[ShardRecord], dtype: numpy.dtype) -> dict[str, Any]:
    """The shards' documents, in order, in their splits; what became of them."""
    fresh, folder = None, workdir.shards
    if job.deduplicate:
        fresh = first_occurrences(numpy.concatenate([read_digests(folder, record.number) for record in records]))
    outputs = job.outputs()
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(IndexedWriter(prefix, dtype, workdir.merged)) for name, prefix in outputs.items()
        }
        seen = 0
        for record in records:
            keep = None if fresh is None else fresh[seen : seen + record.documents]
            seen += record.documents
            prefix = shard_prefix(folder, record.number)
            for name, chosen in _choices(job, folder, record, keep):
                writers[name].add(Part(prefix, chosen))
        for writer in writers.values():
            writer.finish()
        workdir.make_room()
        for writer in writers.values():
            writer.put()
    counts = {
        name: {"prefix": prefix.name, "documents": writers[name].documents, "tokens": writers[name].tokens}
        for name, prefix in outputs.items()
    }
    duplicates = 0 if fresh is None else int((~fresh).sum())
    return {"duplicates": duplicates, "outputs": counts}


def _choices(
    job: Job, folder: Path, record: ShardRecord, keep: numpy.ndarray | None
) -> Iterator[tuple[str, numpy.ndarray | None]]:
    """For each output, which of a shard's documents go there; None means all."""
    if job.split is None:
        yield "all", keep
        return
    which = split_of(read_digests(folder, record.number), list(job.split))
    for index, name in enumerate(SPLITS[: len(job.split)]):
        if job.split[index]:
            chosen = which == index
            yield name, chosen if keep is None else chosen & keep


def _write_faults(job: Job, workdir: Workdir, records: list[ShardRecord]) -> None:
    """Every document that was left out, one JSON line each; no file if there is none."""
    if not any(record.faults for record in records):
        return
    before: Counter[int] = Counter()
    with written_whole(workdir.faults) as unfinished:
        with unfinished.open("w") as file:
            for record in records:
                name = job.inputs.sources[record.source].name
                for fault in read_faults(workdir.shards, record.number) if record.faults else []:
                    place = {"file": name, "line": before[record.source] + fault.line}
                    file.write(json.dumps(place | {k: v for k, v in asdict(fault).items() if k != "line"}) + "\n")
                before[record.source] += record.lines
        flush(unfinished)
