"""Skip-layer attention as tensors that cross layers: what the transport is told of it.  Pure Python."""

from __future__ import annotations

from ..pipeline.declarations import CrossLayerTensor, Declarations
from .numbering import LayerNumbers
from .roles import Shared, shared_by
from .sla_config import SLAConfig


def shared_groups(sla: SLAConfig) -> dict[Shared, tuple[int, ...]]:
    """All K/V that cross layers, in order: each with its groups, of the whole model, ascending."""
    found: dict[Shared, list[int]] = {}
    for layer in range(1, sla.num_layers + 1):
        for group in sla.skip_groups:
            shared = shared_by(sla, layer, group)
            if shared is not None:
                found.setdefault(shared, []).append(group)
    return {shared: tuple(found[shared]) for shared in sorted(found)}


def declare(sla: SLAConfig, numbers: LayerNumbers, tensor_parallel_size: int, head_size: int) -> Declarations:
    """What skip-layer attention hands from layer to layer: keys and values of the groups that have the same readers.

    Args:
        sla: the model's skip-layer attention, which counts attention layers.
        numbers: where those are in the stack.
        tensor_parallel_size: ``T``; each rank has its own groups.
        head_size: channels of a key, and of a value.
    """
    ranks = [sla.rank_groups(tensor_parallel_size, rank) for rank in range(tensor_parallel_size)]
    tensors = []
    for shared, groups in shared_groups(sla).items():
        widths = tuple(sum(group in held for group in groups) for held in ranks)
        source, *readers = map(numbers.in_stack, (shared.source, *shared.readers))
        tensors += [
            # Mixing copies what it reads, so that attention keeps no view of what arrived.
            CrossLayerTensor(name, source, tuple(readers), widths, head_size, readers_copy=True)
            for name in shared.names
        ]
    return Declarations(numbers.num_layers, tuple(tensors), origin=f"{sla}")
