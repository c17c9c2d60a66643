"""One job's work divided among tasks: the plan that says who does what, each task's part of it, and what came of it.

A task needs its number and the folder of unfinished work, nothing else: what the command was told is in the plan.
"""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...common.files import read_json, write_json
from ...common.tokenizers import TokenizerError, tokenizer_settings
from .dealing import Share, deal
from .errors import DataError, file_errors
from .inputs import Inputs, named_inputs
from .job import Job
from .manifests import WORK_FOLDER
from .shards import Shard, read_records
from .tokenizing import encode
from .workdir import Workdir, require_same

#: Flags that say how work is done, which may be others when it goes on; and those whose meaning is kept: a pattern may
#: fit more files by the time a task begins.
_NOT_KEPT = (
    *("command", "options", "on_error", "workers", "overwrite", "tasks", "limit", "dry_run", "local"),
    *("input", "output_prefix"),
)


@dataclass(frozen=True)
class Plan:
    """Who does what.

    Attributes:
        folder: of unfinished work.
        directory: from which names of files are to be read.
        arguments: the flags that all tasks have in common.
        names: of the sources, in order.
        asked: how many tasks there were to be.
        tasks: what each of them does.
    """

    folder: Path
    directory: str
    arguments: dict[str, Any]
    names: list[str]
    asked: int
    tasks: list[list[Share]]

    def write(self) -> None:
        """To :attr:`.workdir.Workdir.plan`."""
        content = {name: value for name, value in vars(self).items() if name not in ("folder", "tasks")}
        tasks = [[list(asdict(share).values()) for share in shares] for shares in self.tasks]
        with file_errors(str(self.folder)):
            write_json(self.job.workdir.plan, content | {"tasks": tasks})

    @property
    def job(self) -> Job:
        """All of the work, without the sources, which nobody needs to open again."""
        args = Namespace(**self.arguments)
        prefix = self.folder.with_name(self.folder.name.removesuffix(WORK_FOLDER))
        inputs = Inputs([], args.field, args.shard_mb, args.max_document_mb)
        split = None if args.split is None else tuple(args.split)
        return Job(inputs, prefix, tokenizer_settings(args), args.append_eod, split, args.deduplicate, fatal=False)

    @property
    def logs(self) -> Path:
        """Where Slurm writes what the tasks say."""
        return self.job.prefix.with_name(f"{self.job.prefix.name}.slurm")

    def prefix(self, task: int) -> Path:
        """Of the task's own folder of unfinished work."""
        return self.job.workdir.tasks / f"{task:05d}"

    def done(self, task: int) -> Path:
        """There when the task is finished."""
        return self.prefix(task).with_suffix(".done")

    def error(self, task: int) -> Path:
        """There when the task was ended by something that it could tell."""
        return self.prefix(task).with_suffix(".error")

    def left(self) -> list[int]:
        """The tasks that are not finished."""
        return [task for task in range(len(self.tasks)) if not self.done(task).exists()]

    def shards(self, task: int) -> list[tuple[Share, Shard]]:
        """What the task has finished, each with the share that it is of."""
        folder = Workdir(self.prefix(task), ()).shards
        shares = self.tasks[task]
        return [
            (shares[record.source], Shard(folder, replace(record, source=shares[record.source].source)))
            for _, record in sorted(read_records(folder).items())
        ]

    def called(self, task: int) -> str:
        """What the task is about, for a message."""
        names = [self.names[share.source] for share in self.tasks[task]]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"task {task} ({names[0]}{more})"


def make_plan(job: Job, args: Namespace) -> Plan:
    """The plan for a job that begins; nothing is written."""
    arguments = {name: value for name, value in vars(args).items() if name not in _NOT_KEPT}
    names = [source.name for source in job.inputs.sources]
    tasks = deal(job.inputs.sources, args.tasks, job.inputs.block_bytes)
    return Plan(job.workdir.folder.absolute(), os.getcwd(), arguments, names, args.tasks, tasks)


def read_plan(folder: Path) -> Plan:
    """The plan in a folder of unfinished work.  Raises ``DataError`` where there is none."""
    try:
        content = read_json(folder / "plan.json")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'plan.json'} cannot be read: {error}") from error
    if content is None:
        raise DataError(f"{folder}: expected the folder of unfinished work that sla-data submit made")
    tasks = [[Share(*share) for share in shares] for shares in content.pop("tasks")]
    return Plan(folder=folder.absolute(), tasks=tasks, **content)


def run_task(plan: Plan, task: int, workers: int) -> None:
    """Do what is left of a task; what ends it is kept in :meth:`Plan.error`, too.

    Faults are not fatal here: all that there are is told at the end, of all tasks at once.

    Raises:
        DataError: with one line; finished shards stay.
        TokenizerError: if the tokenizer cannot be built.
    """
    with _in_directory(plan), Workdir(plan.prefix(task), ()).held():
        if plan.done(task).exists():
            print(f"{plan.called(task)}: nothing to do")
            return
        plan.error(task).unlink(missing_ok=True)
        try:
            job = _job_of(plan, task)
            settings = job.settings()
            require_same(plan.folder, _expected(plan, task), settings)
            vocab_size, records = encode(job, settings, workers, overwrite=False)
        except (DataError, TokenizerError) as error:
            with contextlib.suppress(OSError):  # Of a full disk, say.
                write_json(plan.error(task), {"error": error.reason})
            raise
        with file_errors(str(plan.done(task))):
            write_json(plan.done(task), {"vocab_size": vocab_size, "shards": len(records)})
    documents, tokens = sum(r.documents for r in records), sum(r.tokens for r in records)
    faults = sum(sum(r.faults.values()) for r in records)
    print(f"{plan.called(task)}: {documents:,} documents, {tokens:,} tokens, {faults:,} faults")


def _in_directory(plan: Plan) -> contextlib.AbstractContextManager[None]:
    if not os.path.isdir(plan.directory):
        raise DataError(f"{plan.directory}: expected the folder that the work was submitted from")
    return contextlib.chdir(plan.directory)


def _job_of(plan: Plan, task: int) -> Job:
    shares = plan.tasks[task]
    args = Namespace(**plan.arguments)
    each = sorted({share.source for share in shares})
    opened = named_inputs(args, None if args.dataset else [Path(plan.names[number]) for number in each])
    sources = dict(zip(each, opened.sources, strict=True))
    inputs = replace(opened, sources=[share.of(sources[share.source]) for share in shares])
    return replace(plan.job, inputs=inputs, prefix=plan.prefix(task))


def _expected(plan: Plan, task: int) -> dict[str, Any]:
    """The settings that the work was begun with, as far as the task has to do with them."""
    settings = read_json(plan.folder / "settings.json")
    sources = settings["inputs"]["sources"]
    settings["inputs"]["sources"] = [sources[share.source] for share in plan.tasks[task]]
    return settings
