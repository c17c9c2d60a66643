"""What may be shared and from where, by ``tests/reference.py``, for what ``sla-plan`` says of any of it."""

from __future__ import annotations

from sla_megatron.attention.sla_config import SLAConfig
from tests.reference import ReferenceGPT

TENSORS = {"kv": ("key", "value"), "values": ("value",), "keys": ("key",)}


def source(sla: SLAConfig, layer: int, group: int, kind: str) -> int:
    """The layer that a group's tensor is read from."""
    shape = (sla.num_layers, sla.num_query_groups, sla.num_query_groups, 1)
    settings = (sla.skip_distances, sla.num_skip_groups, sla.layers)
    reference = ReferenceGPT(*shape, *settings, share=sla.share, source_layers=sla.source_layers)
    return reference.source_of(layer, group, kind)


def readers(sla: SLAConfig) -> dict[tuple[str, int, int], list[int]]:
    """(kind, layer, group) -> the layers that read that tensor, its own among them, ascending; [] where it is dead."""
    layers, groups = range(1, sla.num_layers + 1), range(sla.num_query_groups)
    found: dict[tuple[str, int, int], list[int]] = {
        (k, m, g): [] for k in TENSORS["kv"] for m in layers for g in groups
    }
    for kind, layer, group in found:
        found[kind, source(sla, layer, group, kind), group].append(layer)
    return {tensor: sorted(reading) for tensor, reading in found.items()}
