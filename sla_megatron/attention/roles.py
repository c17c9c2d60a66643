"""What one layer does, on one tensor-parallel rank, with the K/V that cross layers.  Pure Python.

Positions count this rank's groups from 0, in order of the group.
"""

from __future__ import annotations

from dataclasses import dataclass

from .sla_config import SLAConfig

#: (source layer, distance): see ``microbatch_kv.py``
BundleName = tuple[int, int]


@dataclass(frozen=True)
class LayerRole:
    """One layer's part.

    Attributes:
        projected: this rank's groups (positions) whose K/V the layer projects, ascending.
        puts: bundle -> which of the projected K/V (index into ``projected``) it is made of.
        takes: the bundles that this layer reads.
        read: for each of this rank's groups, in order, where its K/V come from: ``(None, i)`` is the i-th projected
            one, ``(bundle, i)`` the i-th of a bundle.
    """

    projected: tuple[int, ...]
    puts: dict[BundleName, tuple[int, ...]]
    takes: tuple[BundleName, ...]
    read: tuple[tuple[BundleName | None, int], ...]

    @property
    def reads_nothing_of_its_own(self) -> bool:
        """Whether no K/V that the layer projects on this rank is read by anyone."""
        return bool(self.projected) and not self.puts and all(origin is not None for origin, _ in self.read)

    @classmethod
    def of(cls, sla: SLAConfig, layer: int, tensor_parallel_size: int = 1, rank: int = 0) -> LayerRole:
        """The role of ``layer`` (1-based) on tensor-parallel ``rank``."""
        groups = sla.rank_groups(tensor_parallel_size, rank)
        projected = [g for g in sla.projected_groups(layer) if g in groups]

        puts: dict[BundleName, list[int]] = {}
        for index, group in enumerate(projected):
            reader = sla.consumer(layer, group)
            if reader is not None:
                puts.setdefault((layer, reader - layer), []).append(index)

        # The i-th group that reads a bundle here is the i-th that was put into it: both go in order of the group.
        read: list[tuple[BundleName | None, int]] = []
        taken: dict[BundleName, int] = {}
        for group in groups:
            source = sla.source(layer, group)
            if source == layer:
                read.append((None, projected.index(group)))
            else:
                name = (source, layer - source)
                read.append((name, taken.setdefault(name, 0)))
                taken[name] += 1

        return cls(
            projected=tuple(g - groups.start for g in projected),
            puts={name: tuple(indices) for name, indices in puts.items()},
            takes=tuple(taken),
            read=tuple(read),
        )
