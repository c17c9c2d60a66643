"""``sla-job``: what launch/slurm.sbatch asks before and after each attempt.

sla-job check --run runs/gpt -- MEGATRON FLAGS      0 a chain can go on with them, 2 refused
sla-job begin --run runs/gpt -- FLAGS               0 go on, 10 nothing left to do, 2 refused, 3 crash loop
sla-job stage --run runs/gpt --to /local -- FLAGS   this node: the data on a disk of its own
sla-job command --run runs/gpt -- FLAGS             prints the command that trains, words that a NUL ends
sla-job attend --run runs/gpt --keep 3 -- FLAGS     beside an attempt; 20 save and exit, 21 exit, see RUN/checked.json
sla-job end --run runs/gpt --status 1 -- FLAGS      0 finished or stopped, 75 to be requeued, 3 crash loop
sla-job verify --run runs/gpt                       looks into all checkpoints: 1 if one is damaged
sla-job show --run runs/gpt                         how the run is doing, and its attempts
sla-job health --run runs/gpt --gpus 8              this node: GPUs, and the run's folder
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ...common.errors import one_line_errors
from ...common.flag_types import OneLineParser
from . import (
    attend_command,
    begin_command,
    check_command,
    command_command,
    end_command,
    health_command,
    show_command,
    stage_command,
    verify_command,
)
from .flags import JobError

COMMANDS = {
    "check": check_command,
    "begin": begin_command,
    "attend": attend_command,
    "end": end_command,
    "verify": verify_command,
    "show": show_command,
    "health": health_command,
    "stage": stage_command,
    "command": command_command,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; what cannot be done ends it with one line on stderr and status 2."""
    with one_line_errors("sla-job", all_ranks=True):
        args = _parser().parse_args(argv)
        try:
            status = args.run_command(args)
        except OSError as error:
            raise JobError(f"{error.filename}: {error.strerror}") from error
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="sla-job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run_command=module.run)
    return parser


if __name__ == "__main__":
    main()
