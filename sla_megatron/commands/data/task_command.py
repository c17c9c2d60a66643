"""``sla-data task``: what a task of the array of ``sla-data submit`` does, and the merge behind it."""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DataError
from .tokenize_command import report, worker_count

if TYPE_CHECKING:
    from .division import Plan

_MOST = 99_999


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``task`` to ``sla-data``."""
    parser = commands.add_parser("task", help="what one task of that array, or the merge behind it, executes")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of unfinished work, PREFIX.sla-data")
    parser.add_argument("--index", metavar="N", help="the task's number; default SLURM_ARRAY_TASK_ID")
    parser.add_argument("--workers", type=worker_count, default=1, metavar="N", help="most processes; default 1")
    parser.add_argument("--merge", action="store_true", help="in place of a task: all that they have done to the files")
    parser.add_argument("--on-error", choices=("fatal", "skip"), default="fatal", help="of the merge, for faults")
    parser.set_defaults(command=_task)


def task_count(text: str) -> int:
    """A flag's number of tasks."""
    if not (text.isdecimal() and 1 <= int(text) <= _MOST):
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 1 to {_MOST}")
    return int(text)


def _task(args: Namespace) -> int:
    from .division import read_plan, run_task

    plan = read_plan(args.folder)
    if args.merge:
        return merge(plan, args.on_error == "fatal")
    index = os.environ.get("SLURM_ARRAY_TASK_ID", "") if args.index is None else args.index
    if not (index.isdecimal() and int(index) < len(plan.tasks)):
        raise DataError(f"--index {index or 'without a value'}: expected 0 to {len(plan.tasks) - 1}, or --merge")
    run_task(plan, int(index), args.workers)
    return 0


def merge(plan: Plan, fatal: bool) -> int:
    """Put together what the tasks have done, and print what was made; the exit status."""
    from .gathering import gather

    report(plan.job, gather(plan, fatal))
    return 0
