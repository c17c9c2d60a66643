"""``sla-job``: what launch/slurm.sbatch asks before and after each attempt.

sla-job check --run runs/gpt -- MEGATRON FLAGS      0 a chain can go on with them, 2 refused
sla-job begin --run runs/gpt -- FLAGS               0 go on, 10 nothing left to do, 2 refused, 3 crash loop
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
from tempfile import NamedTemporaryFile

from ...common.errors import FlagError, one_line_errors
from ...common.flag_types import WITH_VALUE, OneLineParser, count
from .chain import FINISHED, REQUEUE, STOP, Chain, begin, end
from .flags import JobError, training_flags

#: Exit statuses: of ``begin`` when training is complete, of ``end`` when it is not (EX_TEMPFAIL), of both in a loop.
NOTHING_LEFT, TRY_AGAIN, LOOP = 10, 75, 3


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; what cannot be done ends it with one line on stderr and status 2."""
    with one_line_errors("sla-job", all_ranks=True):
        args = _parser().parse_args(argv)
        try:
            status = args.command(args)
        except OSError as error:
            raise JobError(f"{error.filename}: {error.strerror}") from error
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="sla-job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    helps = {
        _check: "before a job: whether a chain of attempts can have these flags; writes nothing",
        _begin: "before an attempt: put the checkpoint folder in order, note the attempt",
        _end: "after an attempt: note how it ended, and say what comes next",
        _show: "print the attempts so far",
        _health: "examine this node: GPUs, and whether the run's folder can be written",
    }
    for function, text in helps.items():
        command = commands.add_parser(function.__name__[1:], help=text, description=text)
        command.set_defaults(command=function)
        folder = "the run's folder, where chain.json is"
        command.add_argument("--run", type=_folder, required=True, metavar="FOLDER", help=folder, **WITH_VALUE)
        if function in (_check, _begin, _end):
            command.add_argument("flags", nargs="*", metavar="-- FLAGS", help="all of Megatron's flags of the run")
        if function in (_begin, _end):
            limit = "failures in a row without a new checkpoint that end the chain (default: 3)"
            command.add_argument(
                "--max-failures", type=count("--max-failures"), default=3, metavar="N", help=limit, **WITH_VALUE
            )
        if function is _begin:
            command.add_argument("--job", metavar="NAME", help="what Slurm calls the job (default: SLURM_JOB_ID)")
        if function is _end:
            command.add_argument("--status", type=int, required=True, help="the exit status of the attempt")
            command.add_argument("--signalled", action="store_true", help="Slurm wanted the nodes back")
        if function is _health:
            gpus = "GPUs that this node should have (default: 0)"
            command.add_argument("--gpus", type=count("--gpus", 0), default=0, metavar="N", help=gpus, **WITH_VALUE)
    return parser


def _folder(text: str) -> Path:
    if not text:
        raise FlagError("--run", text, "the run's folder")
    return Path(text)


def _say(line: str) -> None:
    print(f"sla-job: {line}", flush=True)


def _check(args: Namespace) -> int:
    if args.run.exists() and not args.run.is_dir():
        raise FlagError("--run", args.run, "a folder, or none yet")
    training_flags(args.flags)
    return 0


def _begin(args: Namespace) -> int:
    chain = Chain.read(args.run)
    job = args.job or os.environ.get("SLURM_JOB_ID", "none")
    nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
    verdict = begin(chain, training_flags(args.flags), job, nodes, args.max_failures, _say)
    return {FINISHED: NOTHING_LEFT, REQUEUE: 0, STOP: LOOP}[verdict]


def _end(args: Namespace) -> int:
    flags = training_flags(args.flags)
    verdict = end(Chain.read(args.run), flags, args.status, args.signalled, args.max_failures, _say)
    return {FINISHED: 0, REQUEUE: TRY_AGAIN, STOP: LOOP}[verdict]


def _show(args: Namespace) -> int:
    if not (args.run / "chain.json").exists():
        raise FlagError("--run", args.run, "a run's folder, with the chain.json that its first attempt makes")
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
        with NamedTemporaryFile("w", prefix=f".probe.{node}.", dir=args.run) as probe:
            probe.write(node)
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
