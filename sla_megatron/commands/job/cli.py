"""``sla-job``: what launch/slurm.sbatch asks before and after each attempt.

sla-job begin --run runs/gpt -- MEGATRON FLAGS      0 go on, 10 nothing left to do, 2 refused, 3 crash loop
sla-job end --run runs/gpt --status 1 -- FLAGS      0 finished, 75 to be requeued, 3 crash loop
sla-job show --run runs/gpt                         the attempts so far
sla-job health --run runs/gpt --gpus 8              this node: GPUs, and the run's folder
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ...common.errors import one_line_errors
from ...common.flag_types import OneLineParser
from .chain import FINISHED, REQUEUE, STOP, Chain, begin, end, training_flags

#: Exit statuses: of ``begin`` when training is complete, of ``end`` when it is not (EX_TEMPFAIL), of both in a loop.
NOTHING_LEFT, TRY_AGAIN, LOOP = 10, 75, 3


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; what cannot be done ends it with one line on stderr and status 2."""
    parser = OneLineParser(prog="sla-job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function in (("begin", _begin), ("end", _end), ("show", _show), ("health", _health)):
        command = commands.add_parser(name)
        command.add_argument("--run", type=Path, required=True, metavar="FOLDER")
        command.set_defaults(command=function)
        if name in ("begin", "end"):
            command.add_argument("--max-failures", type=int, default=3, metavar="N")
            command.add_argument("flags", nargs="*", metavar="-- FLAGS")
        if name == "end":
            command.add_argument("--status", type=int, required=True)
            command.add_argument("--signalled", action="store_true")
        if name == "health":
            command.add_argument("--gpus", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    with one_line_errors("sla-job", all_ranks=True):
        status = args.command(args)
    sys.exit(status)


def _say(line: str) -> None:
    print(f"sla-job: {line}", flush=True)


def _begin(args: Namespace) -> int:
    chain = Chain.read(args.run)
    job, nodes = os.environ.get("SLURM_JOB_ID", "none"), os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
    verdict = begin(chain, training_flags(args.flags), job, nodes, args.max_failures, _say)
    return {FINISHED: NOTHING_LEFT, REQUEUE: 0, STOP: LOOP}[verdict]


def _end(args: Namespace) -> int:
    flags = training_flags(args.flags)
    verdict = end(Chain.read(args.run), flags, args.status, args.signalled, args.max_failures, _say)
    return {FINISHED: 0, REQUEUE: TRY_AGAIN, STOP: LOOP}[verdict]


def _show(args: Namespace) -> int:
    for number, attempt in enumerate(Chain.read(args.run).attempts, 1):
        until = f"{attempt.ended} at iteration {attempt.ended_at}, {attempt.how}" if attempt.ended else "now"
        print(f"{number:3}  job {attempt.job} on {attempt.nodes}: {attempt.began} at {attempt.began_at} to {until}")
    return 0


def _health(args: Namespace) -> int:
    """What a node needs before a job is worth starting on it."""
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    faults = []
    if args.gpus:
        faults += _gpu_faults(args.gpus)
    try:
        probe = args.run / f".probe.{node}.{os.getpid()}"
        probe.write_text(node)
        probe.unlink()
    except OSError as error:
        faults.append(f"{args.run} cannot be written: {error.strerror}")
    for fault in faults:
        print(f"sla-job: {node} is not healthy: {fault}", file=sys.stderr, flush=True)
    return 1 if faults else 0


def _gpu_faults(count: int) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return ["nvidia-smi is not there"]
    try:
        # It talks to each GPU: one that has fallen off the bus makes it fail, or hang.
        query = ["nvidia-smi", "--query-gpu=index,memory.total", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi: {error}"]
    return [] if len(listed) >= count else [f"{len(listed)} GPUs, {count} are needed"]


if __name__ == "__main__":
    main()
