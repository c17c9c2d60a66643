"""What all tasks have done, put together; or, where that cannot be yet, one report of everything that is in the way."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ...common.files import read_json
from .assembling import assemble, faults_of, write_faults
from .division import Plan
from .documents import FAULTS
from .errors import DataError, file_errors
from .manifests import read_manifest
from .shards import Shard

#: Faults that are shown; all of them are in the file that the report names.
_SHOWN = 20


def gather(plan: Plan, fatal: bool) -> dict[str, Any]:
    """The final files, those of one process that does it all; the manifest.

    Args:
        plan: of the work, which is removed when the files are there.
        fatal: whether faults are in the way.

    Raises:
        DataError: if something is in the way, of which all is said on stderr before.
    """
    job = plan.job
    workdir = job.workdir
    with workdir.held():
        if workdir.is_put():
            manifest = read_manifest(workdir.manifest)
        else:
            shards, sizes = _finished(plan)
            _require_all(plan, shards, fatal)
            if len(sizes) > 1:
                raise DataError(f"tasks found vocabularies of {sizes} tokens: expected one tokenizer on all nodes")
            settings = read_json(plan.folder / "settings.json")
            manifest = assemble(job, settings, shards, plan.names, sizes[0])
        workdir.remove_work()
    return manifest


def _finished(plan: Plan) -> tuple[list[Shard], list[int]]:
    """All shards in the order of the text, and the sizes of the tasks' vocabularies.

    A task whose shards are not all there any more is unfinished from now on.
    """
    found, sizes = [], set()
    for task in range(len(plan.tasks)):
        own = plan.shards(task)
        found += own
        if (done := read_json(plan.done(task))) is not None:
            sizes.add(done["vocab_size"])
            if done["shards"] != len(own):
                plan.done(task).unlink()
    found.sort(key=lambda one: (one[0].source, one[0].start, one[1].record.number))
    return [shard for _, shard in found], sorted(sizes)


def _require_all(plan: Plan, shards: Sequence[Shard], fatal: bool) -> None:
    """Raise ``DataError`` for tasks that are not finished, and where they are fatal for faults, after saying which."""
    left = plan.left()
    faults = sum(sum(shard.record.faults.values()) for shard in shards)
    if not (left or (faults and fatal)):
        return
    for task in left:
        try:
            why = (read_json(plan.error(task)) or {}).get("error")
        except (OSError, ValueError):
            why = None
        count = len(plan.shards(task))
        _say(f"{plan.called(task)}: {why or f'not finished, {count} shards so far; its log is in {plan.logs}'}")
    listed = plan.folder / "faults"
    with file_errors(str(listed)):
        listed.unlink(missing_ok=True)
        if faults:
            write_faults(listed, _known_faults(plan, shards))
    for place in itertools.islice(_known_faults(plan, shards), _SHOWN):
        _say(f"{place['file']}:{place['line']}: {FAULTS[place['kind']]} ({place['detail']})")
    there = f"{faults:,} documents are faults, all of them in {listed}"
    if left:
        also = f"; {there}" if faults else ""
        raise DataError(
            f"{plan.job.prefix}: {len(left)} of {len(plan.tasks)} tasks are not finished{also}: "
            "expected all: the same sla-data submit, without --overwrite, goes on with what is left"
        )
    raise DataError(
        f"{plan.job.prefix}: {there}: expected none, or sla-data submit --on-error skip, which goes on here"
    )


def _known_faults(plan: Plan, shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    """As :func:`.assembling.faults_of`; lines behind a shard that is missing are counted from where it ends."""
    runs, behind = [], None
    for shard in shards:
        record = shard.record
        if (record.source, record.start) != behind:
            runs.append([])
        runs[-1].append(shard)
        behind = record.source, record.end
    for run in runs:
        record = run[0].record
        name = plan.names[record.source]
        if record.start:
            name = f"{name} (from position {record.start} on)"
        yield from faults_of(run, {record.source: name})


def _say(line: str) -> None:
    print(f"sla-data: {line}", file=sys.stderr, flush=True)
