"""``sla-job check``: before a job."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ...common.errors import FlagError
from .arguments import add_flags, add_run
from .flags import training_flags
from .stop_file import refuse_if_stopped

HELP = "before a job: whether a chain of attempts can have these flags; writes nothing"


def add_arguments(command: ArgumentParser) -> None:
    add_run(command)
    add_flags(command)


def run(args: Namespace) -> int:
    if args.run.exists() and not args.run.is_dir():
        raise FlagError("--run", args.run, "a folder, or none yet")
    training_flags(args.flags)
    refuse_if_stopped(args.run)
    return 0
