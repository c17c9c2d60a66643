"""Whether layers run as nodes of a schedule (``--overlap-moe-expert-parallel-comm``) in the way that K/V can follow.

Megatron 0.19 and 0.20 have these nodes in ``models/common``.  dev, which lacks that change, has them in ``models/gpt``,
cut otherwise: there the flag is refused with ``--sla``.
"""

from __future__ import annotations

import importlib.util


def has_schedule_nodes() -> bool:
    """Whether the nodes are those that ``model/schedule_plan.py`` was written for."""
    return importlib.util.find_spec("megatron.core.models.common.utils") is not None
