"""What may be shared and from where, as the specification says it, for what ``sla-plan`` says of any of it."""

from __future__ import annotations

from sla_megatron.attention.sla_config import SLAConfig

TENSORS = {"kv": ("key", "value"), "values": ("value",), "keys": ("key",)}


def source(sla: SLAConfig, layer: int, group: int, kind: str) -> int:
    """The layer that a group's tensor is read from: section 1, word by word."""
    total, count = sla.num_query_groups, sla.num_skip_groups
    skip = [g for g in range(total) if (g + 1) * count // total > g * count // total]
    if kind not in TENSORS[sla.share] or group not in skip:
        return layer
    if sla.layers is not None and layer not in sla.layers:
        return layer
    j = skip.index(group)
    if sla.source_layers:
        earlier = sla.source_layers[j % len(sla.source_layers)]
    else:
        earlier = layer - sla.skip_distances[j % len(sla.skip_distances)]
    return earlier if 1 <= earlier < layer else layer


def readers(sla: SLAConfig) -> dict[tuple[str, int, int], list[int]]:
    """(kind, layer, group) -> the layers that read that tensor, its own among them, ascending; [] where it is dead."""
    layers, groups = range(1, sla.num_layers + 1), range(sla.num_query_groups)
    found: dict[tuple[str, int, int], list[int]] = {
        (k, m, g): [] for k in TENSORS["kv"] for m in layers for g in groups
    }
    for kind, layer, group in found:
        found[kind, source(sla, layer, group, kind), group].append(layer)
    return {tensor: sorted(reading) for tensor, reading in found.items()}
