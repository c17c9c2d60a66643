"""``sla-job check``: before a job."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ...common.errors import FlagError
from .arguments import add_check, add_flags, add_keep, add_run, warn
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
    add_keep(command)
    add_check(command)


def run(args: Namespace) -> int:
    if args.run.exists() and not args.run.is_dir():
        raise FlagError("--run", args.run, "a folder, or none yet")
    flags = training_flags(args.flags)
    if args.keep is not None:
        args.keep.agree(flags)
    refuse_if_stopped(args.run)
    check_launch(args)
    if args.exported is not None:
        if lost := lost_overrides(args.exported):
            warn(lost)
        check_processes(args.flags, args.processes, warn)
        say_what_is_scarce(flags.save, args.nodes, args.processes, warn)
    return 0
