"""``sla-job end``: after an attempt."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .arguments import add_flags, add_max_failures, add_run, say
from .begin_command import LOOP
from .chain import FINISHED, REQUEUE, STAY, STOP, STOPPED, Chain, end
from .checked import Checked
from .flags import training_flags

HELP = "after an attempt: note how it ended, and say what comes next"

#: Exit statuses of an attempt that another follows: of a job that is requeued (EX_TEMPFAIL), and where this one was.
TRY_AGAIN, GO_ON = 75, 76


def add_arguments(command: ArgumentParser) -> None:
    add_run(command)
    add_flags(command)
    add_max_failures(command)
    command.add_argument("--status", type=int, required=True, help="the exit status of the attempt")
    command.add_argument("--signalled", action="store_true", help="Slurm wanted the nodes back")


def run(args: Namespace) -> int:
    flags = training_flags(args.flags)
    verdict = end(Chain.read(args.run), flags, args.status, args.signalled, args.max_failures, say)
    if verdict == FINISHED and (path := Checked(args.run).not_seen(flags.save)) is not None:
        say(f"there was no time to look into {path}: sla-job verify --run {args.run} --save {path} does")
    return {FINISHED: 0, STOPPED: 0, REQUEUE: TRY_AGAIN, STAY: GO_ON, STOP: LOOP}[verdict]
