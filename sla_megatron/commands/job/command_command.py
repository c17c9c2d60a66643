"""``sla-job command``: what trains, as words."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from ...common.files import write_whole
from ...common.flag_types import count
from .additions import additions
from .arguments import add_flags, add_run
from .launching import DOCTOR, TRAINER, add_launch, check_launch, environment, launched
from .script_flags import program_of, takes
from .staging import staged_flags

HELP = "print the command that trains, for each node (with srun, each rank), as words that a NUL ends"


def add_arguments(command: ArgumentParser) -> None:
    add_run(command)
    add_flags(command)
    add_launch(command)
    command.add_argument("--address", default="localhost", metavar="HOST", help="where ranks meet")
    command.add_argument("--port", type=count("--port", 0), default=29500, metavar="N", help="likewise; 0: a free one")
    command.add_argument("--id", default="none", metavar="NAME", help="of the job and its attempt")
    command.add_argument("--logs", type=Path, default=Path("logs"), metavar="FOLDER", help="for the logs of ranks")
    own = "of FLAGS, the first N words are the chain's own, which a script gets where it takes them (default: 0)"
    command.add_argument("--own", type=count("--own", 0), default=0, metavar="N", help=own)
    command.add_argument("--stage", default="", metavar="FOLDER", help="where `sla-job stage` copied data to")
    command.add_argument("--doctor", default="", metavar="FILE", help="sla-doctor instead, which names bad nodes in it")
    command.add_argument("--to", type=Path, metavar="FILE", help="write the words to it (default: print them)")


def run(args: Namespace) -> int:
    check_launch(args)
    words = _words(args)
    # As they came, whatever the locale.
    content = os.fsencode("".join(f"{word}\0" for word in words))
    if args.to is None:
        sys.stdout.buffer.write(content)
    else:
        write_whole(args.to, content)
    return 0


def _words(args: Namespace) -> list[str]:
    """``env NAME=VALUE... COMMAND FLAGS...``."""
    variables = environment(args.processes) | {"SLA_RUN_FOLDER": str(args.run.absolute())}
    if args.doctor:
        flags = ["--bad-nodes", args.doctor, *args.flags]
        command = launched(args, ["-m", DOCTOR], DOCTOR)
    else:
        own_program = bool(args.script or args.module)
        known = takes(args) if own_program else lambda flag: True
        flags = [*taken(args.flags[: args.own], known), *args.flags[args.own :]]
        added = additions(args.run, flags, known)
        variables |= added.environment
        flags = [*added.flags, *flags]
        if args.stage:
            flags = staged_flags(flags, Path(args.stage))
        name = args.module or (Path(args.script).stem if args.script else TRAINER)
        command = launched(args, program_of(args) if own_program else ["-m", TRAINER], name)
    return ["env", *(f"{name}={value}" for name, value in variables.items()), *command, *flags]


def taken(flags: Sequence[str], known: Callable[[str], bool]) -> list[str]:
    """Those that are ``known``, each with its values."""
    found: list[str] = []
    keep = True
    for word in flags:
        if word.startswith("--"):
            keep = known(word.partition("=")[0])
        if keep:
            found.append(word)
    return found
