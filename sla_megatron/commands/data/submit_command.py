"""``sla-data submit``: ``tokenize`` as a Slurm job array."""

from __future__ import annotations

import argparse
from argparse import Namespace

from ...common.sbatch import require_slurm
from .errors import DataError
from .task_command import task_count
from .tokenize_command import add_tokenize_arguments, job_from_args

_DESCRIPTION = """\
What `sla-data tokenize` does, divided among the tasks of a Slurm job array, and the same files, byte for byte.

Files are dealt out by size, large ones in pieces. A last job merges what the tasks have done. Where one of them is not
finished, or documents are faults, it says all that is in the way instead; the same command goes on with what is left.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``submit`` to ``sla-data``."""
    parser = commands.add_parser(
        "submit",
        help="tokenize as a Slurm job array",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Behind -- are options of sbatch, for the tasks and the merge, such as -- --time=4:00:00 --mem=8G.",
    )
    add_tokenize_arguments(parser)
    group = parser.add_argument_group("tasks", "--workers is of each task, which gets as many cores")
    group.add_argument("--tasks", type=task_count, required=True, metavar="N", help="among which the text is divided")
    group.add_argument("--limit", type=task_count, metavar="N", help="tasks at a time; default no limit")
    how = group.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print sbatch's commands; nothing is written")
    how.add_argument("--local", action="store_true", help="without Slurm: the tasks here, one after another")
    parser.set_defaults(command=_submit)


def _submit(args: Namespace) -> int:
    if args.local and args.options:
        raise DataError(f"{' '.join(args.options)}: options of sbatch: expected none with --local")
    if not (args.local or args.dry_run):
        require_slurm(", or --local")
    job = job_from_args(args)
    from .submitting import submit

    return submit(job, args)
