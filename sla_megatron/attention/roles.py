"""What one layer does, on one tensor-parallel rank, with the K/V that cross layers.  Pure Python.

Positions count this rank's groups from 0, in order of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .sla_config import KINDS, Kind, SLAConfig


class SharedTensor(NamedTuple):
    """The keys, or the values, that one layer hands to the same later layers.

    They are of this tensor-parallel rank's groups, in order.  Layers are counted among the attention layers.

    Attributes:
        kind: keys or values.
        source: the layer that projects them.
        readers: the layers that read them, ascending.
    """

    kind: Kind
    source: int
    readers: tuple[int, ...]

    def __str__(self) -> str:
        readers = f"layer{'s' * (len(self.readers) > 1)} {','.join(map(str, self.readers))}"
        return f"skip-layer {self.kind}s of attention layer {self.source} for {readers}"


def shared_by(sla: SLAConfig, layer: int, group: int, kind: Kind) -> SharedTensor | None:
    """What that tensor of ``(layer, group)`` is part of; ``None`` where no later layer reads it."""
    readers = sla.readers(layer, group, kind)
    return SharedTensor(kind, layer, readers) if readers else None


@dataclass(frozen=True)
class TensorRole:
    """What a layer does with the tensors of one kind.

    Attributes:
        projected: this rank's groups (positions) whose tensor the layer projects, ascending.
        puts: what later layers read -> which of the projected ones (index into ``projected``) it is made of.
        takes: what this layer reads of others.
        read: for each of this rank's groups, in order, where it comes from: ``(None, i)`` is the i-th projected one,
            ``(shared, i)`` the i-th of those.
    """

    projected: tuple[int, ...]
    puts: dict[SharedTensor, tuple[int, ...]]
    takes: tuple[SharedTensor, ...]
    read: tuple[tuple[SharedTensor | None, int], ...]

    @classmethod
    def of(cls, sla: SLAConfig, layer: int, kind: Kind, groups: range) -> TensorRole:
        """The role of ``layer`` on the rank that holds ``groups``."""
        projected = [g for g in sla.projected_groups(layer, kind) if g in groups]

        puts: dict[SharedTensor, list[int]] = {}
        for index, group in enumerate(projected):
            shared = shared_by(sla, layer, group, kind)
            if shared is not None:
                puts.setdefault(shared, []).append(index)

        # The i-th group that reads a share here is the i-th that was put into it: both go in order of the group.
        read: list[tuple[SharedTensor | None, int]] = []
        taken: dict[SharedTensor, int] = {}
        for group in groups:
            source = sla.source_of(layer, group, kind)
            if source == layer:
                read.append((None, projected.index(group)))
            else:
                shared = shared_by(sla, source, group, kind)
                read.append((shared, taken.setdefault(shared, 0)))
                taken[shared] += 1

        return cls(
            projected=tuple(g - groups.start for g in projected),
            puts={shared: tuple(indices) for shared, indices in puts.items()},
            takes=tuple(taken),
            read=tuple(read),
        )


@dataclass(frozen=True)
class LayerRole:
    """One layer's part: what it does with keys, and with values."""

    key: TensorRole
    value: TensorRole

    @property
    def both(self) -> tuple[TensorRole, TensorRole]:
        """Keys, values."""
        return self.key, self.value

    @property
    def takes(self) -> tuple[SharedTensor, ...]:
        """What this layer reads of others: keys, then values."""
        return self.key.takes + self.value.takes

    @property
    def puts(self) -> tuple[SharedTensor, ...]:
        """What later layers read of this one: keys, then values."""
        return (*self.key.puts, *self.value.puts)

    @classmethod
    def of(cls, sla: SLAConfig, layer: int, tensor_parallel_size: int = 1, rank: int = 0) -> LayerRole:
        """The role of ``layer`` (1-based) on tensor-parallel ``rank``."""
        groups = sla.rank_groups(tensor_parallel_size, rank)
        return cls(*(TensorRole.of(sla, layer, kind, groups) for kind in KINDS))
