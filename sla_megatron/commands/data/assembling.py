"""Finished shards, wherever they lie, to the final files: documents in order, duplicates, splits, faults, manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy

from ...common.files import flush, write_json, written_whole
from .documents import FAULTS
from .errors import file_errors
from .index_format import dtype_of
from .job import Job
from .manifests import SPLITS
from .merging import IndexedWriter, Part, first_occurrences, split_of
from .progress import waiting_for
from .shards import Shard, read_digests, read_faults, shard_prefix
from .workdir import Workdir


def assemble(
    job: Job, settings: dict[str, Any], shards: Sequence[Shard], names: Sequence[str], vocab_size: int
) -> dict[str, Any]:
    """Make the job's files of its shards, the manifest last; returns that.

    Args:
        settings: of the job.
        shards: all of them, in the order of the text.
        names: of the sources.
        vocab_size: of the tokenizer.
    """
    workdir = job.workdir
    with file_errors(f"{workdir.folder} (the same command goes on)"):
        manifest = {"settings": settings, **_summary(job, shards, vocab_size)}
        with waiting_for("merging", quick=True):
            manifest |= _merge(job, workdir, shards, dtype_of(vocab_size))
            if manifest["faults"]:
                write_faults(workdir.faults, faults_of(shards, names))
        write_json(workdir.manifest, manifest)
    return manifest


def _summary(job: Job, shards: Sequence[Shard], vocab_size: int) -> dict[str, Any]:
    records = [shard.record for shard in shards]
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


def _merge(job: Job, workdir: Workdir, shards: Sequence[Shard], dtype: numpy.dtype) -> dict[str, Any]:
    """The shards' documents, in order, in their splits; what became of them."""
    fresh = None
    if job.deduplicate:
        fresh = first_occurrences(numpy.concatenate([read_digests(s.folder, s.record.number) for s in shards]))
    outputs = job.outputs()
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(IndexedWriter(prefix, dtype, workdir.merged)) for name, prefix in outputs.items()
        }
        seen = 0
        for shard in shards:
            keep = None if fresh is None else fresh[seen : seen + shard.record.documents]
            seen += shard.record.documents
            prefix = shard_prefix(shard.folder, shard.record.number)
            for name, chosen in _choices(job, shard, keep):
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


def _choices(job: Job, shard: Shard, keep: numpy.ndarray | None) -> Iterator[tuple[str, numpy.ndarray | None]]:
    """For each output, which of a shard's documents go there; None means all."""
    if job.split is None:
        yield "all", keep
        return
    which = split_of(read_digests(shard.folder, shard.record.number), list(job.split))
    for index, name in enumerate(SPLITS[: len(job.split)]):
        if job.split[index]:
            chosen = which == index
            yield name, chosen if keep is None else chosen & keep


def write_faults(path: Path, places: Iterable[dict[str, Any]]) -> None:
    """Documents that were left out, one JSON line each."""
    with written_whole(path) as unfinished:
        with unfinished.open("w") as file:
            for place in places:
                file.write(json.dumps(place) + "\n")
        flush(unfinished)


def faults_of(shards: Iterable[Shard], names: Sequence[str] | Mapping[int, str]) -> Iterator[dict[str, Any]]:
    """Each document that was left out, in order: ``file``, ``line``, ``kind``, ``detail``; no shard may be missing."""
    before: Counter[int] = Counter()
    for shard in shards:
        record = shard.record
        for fault in read_faults(shard.folder, record.number) if record.faults else []:
            place = {"file": names[record.source], "line": before[record.source] + fault.line}
            yield place | {what: value for what, value in asdict(fault).items() if what != "line"}
        before[record.source] += record.lines
