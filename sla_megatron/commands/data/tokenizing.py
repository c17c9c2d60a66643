"""The whole job: text to one data set or one for each split, from wherever an earlier run of it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...common.silence import without_announcements
from ...common.waiting import bar
from .assembling import assemble
from .blocks import Block
from .documents import fault_message
from .encoding import Encoder
from .errors import DataError, file_errors
from .inputs import Inputs
from .job import Job
from .plain_tokenizers import imported_for
from .progress import Progress, waiting_for
from .shards import FatalFault, Shard, ShardRecord, ShardWriter, read_faults, read_records
from .sources import without_data
from .workers import Team, ThisProcess


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
        vocab_size, records = encode(job, settings, workers, overwrite, say)
        shards = [Shard(workdir.shards, record) for record in records]
        names = [source.name for source in job.inputs.sources]
        manifest = assemble(job, settings, shards, names, vocab_size)
        workdir.remove_work()
        return manifest


def encode(
    job: Job, settings: dict[str, Any], workers: int, overwrite: bool, say: Callable[[str], None] = print
) -> tuple[int, list[ShardRecord]]:
    """Write all shards, or those that are missing; how many tokens the vocabulary has, and the shards in order.

    Args:
        settings: of the job.
        overwrite: whether to begin anew.

    Raises:
        DataError: with one line, for whatever ends the job; finished shards stay.
        TokenizerError: if the tokenizer cannot be built; then nothing was written.
    """
    workdir = job.workdir
    with _workers(job, workers) as team:
        with waiting_for("loading the tokenizer"):
            vocab_size = team.vocab_size()
        if workdir.begin(settings, overwrite):
            say(f"going on in {workdir.folder}")
        with file_errors(f"{workdir.folder} (the same command goes on)"):
            return vocab_size, _write_shards(job, workdir.shards, team)


def _workers(job: Job, most: int) -> Team | ThisProcess:
    """Who turns blocks into shards; one worker is this process."""
    if most == 1:
        return ThisProcess(_prepare, (job,))
    sources = [without_data(source) for source in job.inputs.sources]
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
