"""The table of ``sla-sweep report --json``, for ``docs/results.md``."""

from __future__ import annotations

from typing import Any

from sla_megatron.sweep.report import HEADER, NOTE, cells
from sla_megatron.sweep.summary import groups

from .record import Table


def tables(result: dict[str, Any]) -> list[Table]:
    """One line a setting, over its seeds."""
    rows = [cells(group) for group in groups(result["rows"])]
    return [Table(f"Validation loss, {result['rows'][0]['tokens']:,} tokens a run", HEADER, rows, (0, 4), NOTE)]
