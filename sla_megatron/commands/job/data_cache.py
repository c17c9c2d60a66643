"""Megatron's data cache in the run's folder, after an attempt that was ended while rank 0 wrote it.

Megatron looks only whether its files are there (``GPTDataset._build_document_sample_shuffle_indices``): with one that
is cut off every later attempt would fail.
"""

from __future__ import annotations

import ast
import math
import struct
from collections.abc import Callable
from pathlib import Path

from ...common.checkpoint_folders import aside

#: In the run's folder.
DATA_CACHE = "data-cache"


def set_aside_cut_off(run: Path, say: Callable[[str], None]) -> None:
    """Rename what is not whole in the cache of ``run``, so that Megatron builds it anew; nothing is removed.

    For a job that has the run to itself: what another is writing is not whole either.
    """
    for path in sorted((run / DATA_CACHE).glob("*.npy")):
        if not _is_whole(path):
            say(f"{path} is cut off: it is now {aside(path, 'incomplete')}, and is built anew")


def _is_whole(path: Path) -> bool:
    """Whether the file is as long as its head says (``numpy.lib.format``)."""
    with path.open("rb") as file:
        start = file.read(12)
        try:
            wide = start[6] > 1
            (length,) = struct.unpack_from("<I" if wide else "<H", start, 8)
            begins = (12 if wide else 10) + length
            file.seek(12 if wide else 10)
            head = ast.literal_eval(file.read(length).decode("latin1"))
            # Such as <i8: Megatron writes numbers of one kind alone.
            size = math.prod(head["shape"]) * int(head["descr"][2:])
        except (IndexError, KeyError, SyntaxError, TypeError, ValueError, struct.error):
            return False
    return path.stat().st_size >= begins + size
