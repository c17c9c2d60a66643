"""Skip-layer attention as tensors that cross layers: what the transport is told of it.  Pure Python."""

from __future__ import annotations

from ..pipeline.declarations import CrossLayerTensor, Declarations
from .numbering import LayerNumbers
from .roles import SharedTensor, shared_by
from .sla_config import SLAConfig


def shared_groups(sla: SLAConfig) -> dict[SharedTensor, tuple[int, ...]]:
    """All that crosses layers, in payload order: each with its groups, of the whole model, ascending."""
    found: dict[SharedTensor, list[int]] = {}
    for layer in range(1, sla.num_layers + 1):
        for group in sla.skip_groups:
            for kind in sla.shared_kinds:
                shared = shared_by(sla, layer, group, kind)
                if shared is not None:
                    found.setdefault(shared, []).append(group)
    in_order = sorted(found, key=lambda shared: (shared.source, shared.readers, shared.kind))
    return {shared: tuple(found[shared]) for shared in in_order}


def declare(sla: SLAConfig, numbers: LayerNumbers, tensor_parallel_size: int, head_size: int) -> Declarations:
    """What skip-layer attention hands from layer to layer: keys, and values, of the groups that have the same readers.

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
        # Mixing copies what it reads, so that attention keeps no view of what arrived.
        tensors.append(CrossLayerTensor(shared, source, tuple(readers), widths, head_size, readers_copy=True))
    return Declarations(numbers.num_layers, tuple(tensors), origin=f"{sla}")
