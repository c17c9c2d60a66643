"""The flags of ``sla-doctor`` beside those of the job."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ...common.errors import FlagError
from ...common.flag_types import WITH_VALUE, file_name, number
from ...common.replacing import named_by_flags, replaced_input

DEFAULT_TIMEOUT = 300.0


def add_doctor_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags to ``parser`` and return it."""
    group = parser.add_argument_group("sla-doctor", "whether the job can run; takes the job's own flags beside these")
    group.add_argument(
        "--num-gpus",
        type=number("--num-gpus", int, "an integer >= 1"),
        metavar="N",
        **WITH_VALUE,
        help="World size to assume where this runs alone. Default: the fewest GPUs that the parallel sizes allow.",
    )
    group.add_argument(
        "--quick", action="store_true", help="Leave out the forward and backward pass over the job's layout."
    )
    group.add_argument(
        "--software",
        action="store_true",
        help="Examine what is installed, and nothing else: of a container's image, say. Takes no job's flags and needs "
        "no GPU; --device cuda: as for one, whatever torch was built for.",
    )
    group.add_argument(
        "--rates",
        action="store_true",
        help="On the job's ranks, after all checks: measure how fast pipeline neighbours exchange the job's payloads, "
        "and what the job's own layers achieve, forward and backward, in under a minute. The last line is the flags "
        "with which sla-plan predicts a step.",
    )
    group.add_argument(
        "--timeout",
        type=number("--timeout", float, "seconds, more than 0", below=1e9),
        default=DEFAULT_TIMEOUT,
        metavar="SECONDS",
        **WITH_VALUE,
        help="How long rank 0 waits for the others: to come, to examine their nodes, and to run the layout. "
        f"Default: {DEFAULT_TIMEOUT:.0f}.",
    )
    group.add_argument(
        "--bad-nodes",
        type=file_name("--bad-nodes"),
        metavar="FILE",
        **WITH_VALUE,
        help="Write the names of the nodes whose own check failed to this file, one a line; empty if there is none. "
        "A check that fails on all nodes says nothing of one, but for missing GPUs.",
    )
    return parser


def check_doctor_args(args: Namespace) -> None:
    """What needs no job.  Raises :class:`FlagError`."""
    if args.rates and args.quick:
        raise FlagError("--rates", True, "no --quick beside it: it measures over the job's layout")
    if args.bad_nodes is not None:
        path = Path(args.bad_nodes)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise FlagError("--bad-nodes", args.bad_nodes, "a file in a directory that exists")
        if (read := replaced_input(path, named_by_flags(sys.argv[1:]))) is not None:
            raise FlagError("--bad-nodes", args.bad_nodes, f"another file, {read} is read")
        if path.exists() and not _is_list_of_nodes(path):
            raise FlagError("--bad-nodes", args.bad_nodes, "a new file, or an earlier list of nodes")


def _is_list_of_nodes(path: Path) -> bool:
    with path.open("rb") as file:
        return re.fullmatch(rb"([\w.-]+\n)*", file.read(1 << 16)) is not None
