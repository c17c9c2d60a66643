"""``sla-job check``: before a job."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ...common.errors import FlagError
from .arguments import add_check, add_flags, add_keep, add_run
from .flags import training_flags

HELP = "before a job: whether a chain of attempts can have these flags; writes nothing"


def add_arguments(command: ArgumentParser) -> None:
    add_run(command)
    add_flags(command)
    add_keep(command)
    add_check(command)


def run(args: Namespace) -> int:
    if args.run.exists() and not args.run.is_dir():
        raise FlagError("--run", args.run, "a folder, or none yet")
    flags = training_flags(args.flags)
    if args.keep is not None:
        args.keep.agree(flags)
    return 0
