"""``sla-job check``: before a job."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from ...common.errors import FlagError
from .arguments import add_flags, add_run
from .flags import training_flags
from .launching import add_launch, check_launch
from .resources import check_processes, lost_overrides, say_what_is_scarce
from .stop_file import refuse_if_stopped

HELP = "before a job: whether a chain of attempts can have these flags; writes nothing"


def add_arguments(command: ArgumentParser) -> None:
    add_run(command)
    add_flags(command)
    add_launch(command)
    exported = "sbatch's --export; with it, the environment of a job is looked at too (default: no job)"
    command.add_argument("--exported", metavar="WORDS", help=exported)


def run(args: Namespace) -> int:
    if args.run.exists() and not args.run.is_dir():
        raise FlagError("--run", args.run, "a folder, or none yet")
    found = training_flags(args.flags)
    refuse_if_stopped(args.run)
    check_launch(args)
    if args.exported is not None:
        if lost := lost_overrides(args.exported):
            _warn(lost)
        check_processes(args.flags, args.processes, _warn)
        say_what_is_scarce(found.save, args.nodes, args.processes, _warn)
    return 0


def _warn(line: str) -> None:
    print(f"sla-job: {line}", file=sys.stderr, flush=True)
