"""``--device``: a GPU where there is one, else the CPU backend.

Decided before Megatron's flags are parsed, since validating them already asks for a CUDA device.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from ..common.errors import one_line_errors
from ..upstream.compiled_helpers import missing_makefile_seams
from ..upstream.seams import replaced, require_megatron
from . import choose_device, cpu_backend

#: Kept, or leaving them would undo what they entered.
_entered_for_good: list[AbstractContextManager[str]] = []


def add_device_arg(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--device`` to ``parser`` and return it."""
    parser.add_argument(
        "--device",
        default="auto",
        nargs="?",
        const="",
        metavar="{auto,cpu,cuda}",
        help="auto: a GPU where there is one, else the CPU backend (gloo). Default: auto.",
    )
    return parser


@contextmanager
def megatron_device(argv: Sequence[str] | None = None) -> Iterator[str]:
    """Within the block, Megatron can be imported and run on the device that ``--device`` in ``argv`` asks for.

    Yields ``"cpu"`` or ``"cuda"``.  On ``cuda`` nothing of torch or Megatron is replaced but a build step that the
    wheel cannot do (``wheel.py``).  A bad ``--device``, or a Megatron that this was not checked with, ends the run: one
    line, exit status 2.
    """
    parser = add_device_arg(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    requested, _ = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    with one_line_errors():
        device = choose_device(requested.device)
        require_megatron()
    with ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(cpu_backend())
        stack.enter_context(replaced(missing_makefile_seams()))
        yield device


def enter_megatron_device() -> None:
    """:func:`megatron_device` for the rest of the process: a GPU where there is one, else the CPU backend.

    For a script that imports Megatron at its top.  A helper process, in which multiprocessing imports the script again,
    computes nothing and needs no device.
    """
    if multiprocessing.parent_process() is None:
        _entered_for_good.append(megatron_device([]))
        _entered_for_good[-1].__enter__()
