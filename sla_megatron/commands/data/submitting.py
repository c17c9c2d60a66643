"""What ``sla-data submit`` does: checks first, then a plan, then jobs of Slurm or, without it, the tasks one by one."""

from __future__ import annotations

import contextlib
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ...common.errors import StartError
from ...common.silence import without_announcements
from ...common.tokenizers import TokenizerError
from . import slurm
from .division import Plan, make_plan, read_plan, run_task
from .documents import Fault, fault_message
from .encoding import Encoder
from .errors import DataError
from .job import Job
from .progress import waiting_for
from .task_command import merge


def submit(job: Job, args: Namespace) -> int:
    """Divide ``job``, or go on where it is divided already; the exit status.

    Raises:
        StartError: with one line, before anything is written; of ``--local``, for what the merge refuses, too.
    """
    workdir = job.workdir
    with waiting_for("looking at the files", quick=True):
        settings = job.settings()
        workdir.require_no_input([*job.inputs.files(), *map(Path, settings["tokenizer_files"])])
    if args.dry_run:
        if _is_finished(args, job, settings):
            return 0
        _require_sound(job)
        _show(_plan(args, job, workdir.goes_on(settings, args.overwrite, divided=True)), args)
        return 0
    with workdir.held():
        if _is_finished(args, job, settings):
            workdir.remove_work()
            return 0
        slurm.require_idle(workdir.folder)
        _require_sound(job)
        goes_on = workdir.goes_on(settings, args.overwrite, divided=True)
        plan = _plan(args, job, goes_on)
        workdir.begin(settings, args.overwrite, divided=True)
        plan.write()
    if not args.local:
        return _to_slurm(plan, args, goes_on)
    for task in plan.left():
        # Why it ended is in the merge's report.
        with contextlib.suppress(DataError, TokenizerError):
            run_task(plan, task, args.workers)
    return merge(plan, fatal=job.fatal)


def _is_finished(args: Namespace, job: Job, settings: dict[str, Any]) -> bool:
    finished = not args.overwrite and job.workdir.finished(settings) is not None
    if finished:
        print(f"{job.workdir.manifest}: nothing to do")
    return finished


def _require_sound(job: Job) -> None:
    """Raise for a tokenizer that cannot be built, and where faults are fatal for a first document that is none."""
    with waiting_for("loading the tokenizer"), without_announcements():
        Encoder(job.tokenizer, job.append_eod)
    block = next(job.inputs.blocks(), None) if job.fatal else None
    first = None if block is None else next(job.inputs.documents(block), None)
    if isinstance(first, Fault):
        raise DataError(fault_message(job.inputs.sources[block.source].name, first.line, first))


def _plan(args: Namespace, job: Job, goes_on: bool) -> Plan:
    """The plan that the work was begun with, or a new one."""
    workdir = job.workdir
    if not (goes_on and workdir.plan.exists()):
        return make_plan(job, args)
    plan = read_plan(workdir.folder)
    if plan.asked != args.tasks:
        raise DataError(
            f"--tasks {args.tasks}: {workdir.folder} was divided among {plan.asked}: expected that, or --overwrite"
        )
    return plan


def _show(plan: Plan, args: Namespace) -> None:
    """What would be submitted, as a shell reads it."""
    array, job_number = slurm.array_command(plan, args.limit, args.workers, args.options), None
    if array is not None:
        job_number = "ARRAY"
        print(shlex.join(array))
    print(shlex.join(slurm.merge_command(plan, job_number, args.on_error == "fatal", args.options)))
    _tell(plan)


def _to_slurm(plan: Plan, args: Namespace, goes_on: bool) -> int:
    try:
        *array, last = slurm.submit(plan, args.limit, args.workers, args.on_error == "fatal", args.options)
    except StartError:
        with contextlib.suppress(OSError):
            plan.logs.rmdir()
        if not goes_on:
            with plan.job.workdir.held():
                plan.job.workdir.remove_work()
        raise
    _tell(plan)
    for number in array:
        print(f"submitted: job {number}, the tasks; job {last}, the merge, waits for it; logs: {plan.logs}")
    if not array:
        print(f"submitted: job {last}, the merge; logs: {plan.logs}")
    return 0


def _tell(plan: Plan) -> None:
    """How the work is divided, on stderr."""
    left, loads = plan.left(), [sum(share.work for share in shares) for shares in plan.tasks]
    unit = "rows" if plan.arguments["dataset"] else "bytes"
    fewer = f", of {plan.asked} asked for" if plan.asked > len(loads) else ""
    print(
        f"sla-data: {len(left)} of {len(loads)} tasks to do{fewer}; {min(loads):,.0f} to {max(loads):,.0f} {unit} each",
        file=sys.stderr,
    )
