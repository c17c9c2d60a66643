"""The line that Megatron prints of an iteration, or of ``--log-interval`` of them: ``training_log`` in
megatron/training/training.py."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PROGRESS = re.compile(r"\biteration +(\d+)/ *(\d+) \|(.*)")


@dataclass(frozen=True)
class ProgressLine:
    """``iteration`` of ``last``, and what the line says of it, by name, as it was printed."""

    iteration: int
    last: int
    values: dict[str, str]


def progress_line(line: str) -> ProgressLine | None:
    """Read ``line``; None is another one."""
    found = _PROGRESS.search(line)
    if found is None:
        return None
    values = (part.strip().rpartition(":") for part in found[3].split("|"))
    return ProgressLine(int(found[1]), int(found[2]), {name: value.strip() for name, colon, value in values if colon})
