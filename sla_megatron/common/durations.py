"""Times as people say them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """``42 s``, ``3 min``, ``5 h 20 min``, ``4 d 3 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 100:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
