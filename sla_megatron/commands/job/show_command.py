"""``sla-job show``: how a run is doing."""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import ArgumentParser, Namespace

from ...common.errors import FlagError
from ...common.flag_types import number
from .arguments import add_run
from .progress.report import ENDED, report
from .progress.text import lines

HELP = "print how the run is doing: state, iteration, speed, time left, checkpoint, and its attempts"


def add_arguments(command: ArgumentParser) -> None:
    add_run(command)
    command.add_argument("--json", action="store_true", help="as one JSON object a line, with keys that stay")
    seconds = number("--watch", float, "a number of seconds, more than 0")
    every = "again every so many seconds, until the run has ended (default without a value: 10)"
    command.add_argument("--watch", type=seconds, nargs="?", const=10.0, metavar="SECONDS", help=every)


def run(args: Namespace) -> int:
    if not (args.run / "chain.json").exists():
        raise FlagError("--run", args.run, "a run's folder, with the chain.json that its first attempt makes")
    try:
        while True:
            found = report(args.run)
            if args.json:
                print(json.dumps(found), flush=True)
            else:
                # To the top of a screen that is cleared; in a file each time is a block of its own.
                begin = "\x1b[H\x1b[2J" if args.watch and sys.stdout.isatty() else ""
                end = "\n" if args.watch and not begin else ""
                print(begin + "\n".join(lines(found)) + end, flush=True)
            if args.watch is None or found["state"] in ENDED:
                return 0
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # Whoever reads has read enough, as head.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
