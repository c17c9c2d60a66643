"""The process groups that Megatron's schedules take where they are given none.

Megatron 0.19 and 0.20 have a function for them (upstream's #5901).  In dev, which lacks that change, each schedule
spells them out.
"""

from __future__ import annotations

from typing import Any

from ..seams import OneOf, Reliance

#: What dev's schedules spell out; a test reads it off them.
_OF_DEV = ["tp", "cp", "embd", "pos_embd", "pp", "dp_cp", "tp_dp_cp"]

_DEFAULT = Reliance(
    "megatron.core.pipeline_parallel.schedules:_build_default_pg_collection",
    "called as the schedules call it, for the groups that the communicator needs",
    (),
)

SCHEDULE_GROUPS = OneOf(
    _DEFAULT,
    Reliance(
        "megatron.core.process_groups_config:ProcessGroupCollection.use_mpu_process_groups",
        "called for the groups that dev's schedules take by themselves, which the communicator needs",
        ("required_pgs",),
    ),
)


def schedule_groups() -> Any:
    """Megatron's ``ProcessGroupCollection``.  Raises ``SeamError`` if upstream changed."""
    fitting = SCHEDULE_GROUPS.fitting()
    owner, name = fitting.resolve()
    return getattr(owner, name)(*(() if fitting is _DEFAULT else (_OF_DEV,)))
