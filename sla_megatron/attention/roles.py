"""What one layer does, on one tensor-parallel rank, with the K/V that cross layers.  Pure Python.

Positions count this rank's groups from 0, in order of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from .sla_config import SLAConfig


class Shared(NamedTuple):
    """The K/V that one layer hands to the same later layers: of this tensor-parallel rank's groups, in order.

    Layers are counted among the attention layers.

    Attributes:
        source: the layer that projects them.
        readers: the layers that read them, ascending.
    """

    source: int
    readers: tuple[int, ...]

    @property
    def names(self) -> tuple[SharedTensor, SharedTensor]:
        """Of the two tensors, keys and values."""
        return SharedTensor("key", *self), SharedTensor("value", *self)


class SharedTensor(NamedTuple):
    """What the keys, or the values, of a :class:`Shared` are called where they cross layers."""

    kind: Literal["key", "value"]
    source: int
    readers: tuple[int, ...]

    def __str__(self) -> str:
        readers = f"layer{'s' * (len(self.readers) > 1)} {','.join(map(str, self.readers))}"
        return f"skip-layer {self.kind}s of attention layer {self.source} for {readers}"


def shared_by(sla: SLAConfig, layer: int, group: int) -> Shared | None:
    """What the K/V of ``(layer, group)`` are part of; ``None`` where no later layer reads them."""
    reader = sla.consumer(layer, group)
    return None if reader is None else Shared(layer, (reader,))


@dataclass(frozen=True)
class LayerRole:
    """One layer's part.

    Attributes:
        projected: this rank's groups (positions) whose K/V the layer projects, ascending.
        puts: what later layers read -> which of the projected K/V (index into ``projected``) it is made of.
        takes: what this layer reads of others.
        read: for each of this rank's groups, in order, where its K/V come from: ``(None, i)`` is the i-th projected
            one, ``(shared, i)`` the i-th of those.
    """

    projected: tuple[int, ...]
    puts: dict[Shared, tuple[int, ...]]
    takes: tuple[Shared, ...]
    read: tuple[tuple[Shared | None, int], ...]

    @property
    def reads_nothing_of_its_own(self) -> bool:
        """Whether no K/V that the layer projects on this rank is read by anyone."""
        return bool(self.projected) and not self.puts and all(origin is not None for origin, _ in self.read)

    @classmethod
    def of(cls, sla: SLAConfig, layer: int, tensor_parallel_size: int = 1, rank: int = 0) -> LayerRole:
        """The role of ``layer`` (1-based) on tensor-parallel ``rank``."""
        groups = sla.rank_groups(tensor_parallel_size, rank)
        projected = [g for g in sla.projected_groups(layer) if g in groups]

        puts: dict[Shared, list[int]] = {}
        for index, group in enumerate(projected):
            shared = shared_by(sla, layer, group)
            if shared is not None:
                puts.setdefault(shared, []).append(index)

        # The i-th group that reads a share here is the i-th that was put into it: both go in order of the group.
        read: list[tuple[Shared | None, int]] = []
        taken: dict[Shared, int] = {}
        for group in groups:
            source = sla.source(layer, group)
            if source == layer:
                read.append((None, projected.index(group)))
            else:
                shared = shared_by(sla, source, group)
                read.append((shared, taken.setdefault(shared, 0)))
                taken[shared] += 1

        return cls(
            projected=tuple(g - groups.start for g in projected),
            puts={shared: tuple(indices) for shared, indices in puts.items()},
            takes=tuple(taken),
            read=tuple(read),
        )
