"""``--device``: a GPU where there is one, else the CPU backend.

Decided before Megatron's flags are parsed, since validating them already asks for a CUDA device.  torch and Megatron
are imported when a device is chosen, not before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from ..common.errors import FlagError, one_line_errors
from ..common.flag_types import WITH_VALUE
from ..upstream.compiled_helpers import missing_makefile_seams
from ..upstream.megatron_version import require_megatron
from ..upstream.seams import replaced

DEVICES = ("auto", "cpu", "cuda")

#: Kept, or leaving them would undo what they entered.
_entered_for_good: list[AbstractContextManager[str]] = []


def add_device_arg(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--device`` to ``parser`` and return it."""
    parser.add_argument(
        "--device",
        default="auto",
        **WITH_VALUE,
        metavar="{auto,cpu,cuda}",
        help="auto: a GPU where there is one, else the CPU backend (gloo). Default: auto.",
    )
    return parser


def requested_device(argv: Sequence[str]) -> str:
    """``--device``'s value in ``argv``, as it stands; the last one counts."""
    parser = add_device_arg(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    return parser.parse_known_args(list(argv))[0].device


def require_device_name(requested: str) -> None:
    """Raise :class:`FlagError` for a value of ``--device`` that there is not."""
    if requested not in DEVICES:
        raise FlagError("--device", requested, f"one of {', '.join(DEVICES)}")


def choose_device(requested: str) -> str:
    """``"cpu"`` or ``"cuda"`` for ``--device``'s value; ``auto`` takes a GPU where there is one.

    Raises :class:`FlagError` for an unknown value, or for ``cuda`` on a machine without a GPU.
    """
    require_device_name(requested)
    import torch

    from .backend import cpu_backend_is_active

    has_gpu = torch.cuda.is_available() and not cpu_backend_is_active()
    if requested == "cuda" and not has_gpu:
        raise FlagError("--device", requested, "cpu or auto on this machine: torch finds no CUDA GPU here")
    if requested == "auto":
        return "cuda" if has_gpu else "cpu"
    return requested


@contextmanager
def megatron_device(argv: Sequence[str] | None = None) -> Iterator[str]:
    """Within the block, Megatron can be imported and run on the device that ``--device`` in ``argv`` asks for.

    Yields ``"cpu"`` or ``"cuda"``.  On ``cuda`` nothing of torch or Megatron is replaced but a build step that the
    wheel cannot do (``upstream/compiled_helpers.py``).  A bad ``--device``, or a Megatron that this was not checked
    with, ends the run: one line, exit status 2.
    """
    with one_line_errors():
        device = choose_device(requested_device(sys.argv[1:] if argv is None else argv))
        require_megatron()
    from .backend import cpu_backend

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
