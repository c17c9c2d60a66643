"""``sla-job begin``: before an attempt."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from argparse import ArgumentParser, Namespace
from typing import Any

from .arguments import add_flags, add_max_failures, add_run, say
from .chain import FINISHED, REQUEUE, STOP, Chain, begin
from .data_cache import set_aside_cut_off
from .flags import training_flags

HELP = "before an attempt: put the checkpoint folder in order, note the attempt"

#: Exit statuses when training is complete, and in a crash loop.
NOTHING_LEFT, LOOP = 10, 3


def add_arguments(command: ArgumentParser) -> None:
    add_run(command)
    add_flags(command)
    add_max_failures(command)
    command.add_argument("--job", metavar="NAME", help="what Slurm calls the job (default: SLURM_JOB_ID)")


def run(args: Namespace) -> int:
    chain = Chain.read(args.run)
    chain.logs = _logs()
    job = args.job or os.environ.get("SLURM_JOB_ID", "none")
    nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
    verdict = begin(chain, training_flags(args.flags), job, nodes, args.max_failures, say)
    if verdict == REQUEUE:
        set_aside_cut_off(args.run, say)
    return {FINISHED: NOTHING_LEFT, REQUEUE: 0, STOP: LOOP}[verdict]


def _logs() -> dict[str, Any]:
    """Where this attempt's logs are; this prints to the job's own, unless it is a step, as in a container."""
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    found: dict[str, Any] = {"restart": int(restart) if restart.isdecimal() else None}
    with contextlib.suppress(OSError):
        about = os.fstat(1)
        if stat.S_ISREG(about.st_mode):
            found |= {"log": os.readlink("/proc/self/fd/1"), "log_from": about.st_size}
    return found
