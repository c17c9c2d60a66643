"""What Megatron says while it is imported, or asked for something, and nobody wants to hear."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def without_announcements() -> Iterator[None]:
    """Within the block nothing announces that CUDA, Apex and Transformer Engine are missing: they have no use there."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Within the block nothing is printed to the standard output or warned of; what ends the program is said after all.

    Other threads are silent as well, but for what they hold of the standard output from before.
    """
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(printed):
            yield
    except SystemExit:
        sys.stdout.write(printed.getvalue())
        raise
