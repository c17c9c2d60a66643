"""Times and sizes as people say them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """``42 s``, ``3 min``, ``5 h 20 min``, ``4 d 3 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 100:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def shown_size(size: float) -> str:
    """Bytes, as disks are sold: ``4.15 kB``, ``67.1 MB``, ``1.2 TB``."""
    for unit, amount in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= amount:
            return f"{size / amount:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
