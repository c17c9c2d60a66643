"""The C library's heap while something on a processor is timed."""

from __future__ import annotations

import ctypes

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, for the rest of this process.  Returns whether it does; elsewhere nothing changes.

    By default it returns every large block to the system at once and asks for it again in the next step: a tenth of a
    training step, and most of its spread, is then that of the system clearing pages.  A GPU's memory is kept by torch.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # 1 is success; -1 as the threshold is never.
    return mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, -1) == 1
