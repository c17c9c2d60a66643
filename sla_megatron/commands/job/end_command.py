"""``sla-job end``: after an attempt."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .arguments import add_flags, add_max_failures, add_run, say
from .begin_command import LOOP
from .chain import FINISHED, REQUEUE, STOP, STOPPED, Chain, end
from .checked import Checked
from .flags import training_flags

HELP = "after an attempt: note how it ended, and say what comes next"

#: Exit status of an attempt that another follows (EX_TEMPFAIL).
TRY_AGAIN = 75


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
    return {FINISHED: 0, STOPPED: 0, REQUEUE: TRY_AGAIN, STOP: LOOP}[verdict]
