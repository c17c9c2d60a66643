"""Which keys the queries of a rank read, where its share of the sequence and documents cut causal attention.  Pure.

With context parallelism a rank holds two chunks of the sequence, in the order that balances causal attention: of
``2C`` equal chunks, rank ``r`` holds chunk ``r`` and chunk ``2C - 1 - r``.  Source: upstream's
``megatron.core.utils:get_batch_on_this_cp_rank``, "per-sequence zigzag".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Stretch:
    """Neighbouring queries, the last of which reads all of ``keys``, the one before it all but the last, and so on.

    Attributes:
        rows: the queries, among those that the rank holds.
        keys: positions of the whole sequence; never fewer than there are rows.
    """

    rows: slice
    keys: slice

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def num_keys(self) -> int:
        return self.keys.stop - self.keys.start


# All layers of a microbatch ask for the same; the next one has other documents.
@lru_cache(maxsize=128)
def stretches(length: int, documents: tuple[int, ...] = (0,), size: int = 1, rank: int = 0) -> tuple[Stretch, ...]:
    """The rank's queries in their order, cut where its chunks end and where documents do.

    Args:
        length: positions of the whole sequence, a multiple of ``2 * size`` where ``size > 1``.
        documents: the positions at which documents start, ascending, the first one 0.
        size, rank: of the context-parallel group.
    """
    width = length // (2 * size) if size > 1 else length
    chunks = (rank, 2 * size - 1 - rank) if size > 1 else (0,)
    found: list[Stretch] = []
    row = 0
    for chunk in chunks:
        first, last = chunk * width, (chunk + 1) * width
        cuts = [first, *(start for start in documents if first < start < last), last]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            document = documents[bisect_right(documents, start) - 1]
            found.append(Stretch(slice(row, row + stop - start), slice(document, stop)))
            row += stop - start
    return tuple(found)


@lru_cache
def natural_order(size: int) -> tuple[int, ...]:
    """Where each of the ``2 * size`` chunks, in the order of the sequence, is among all ranks' chunks, rank by rank."""
    held = [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]
    return tuple(held.index(chunk) for chunk in range(2 * size))


def documents_of_samples(boundaries: Sequence[int], num_samples: int, length: int) -> tuple[tuple[int, ...], ...]:
    """For each sample the positions at which documents start in it.

    Args:
        boundaries: where documents start, and end, if all samples lay one after the other, ascending from 0
            (``cu_seqlens``).  A sample starts a document.
        num_samples, length: how many samples there are, of how many positions each.
    """
    samples: list[list[int]] = [[0] for _ in range(num_samples)]
    for boundary in boundaries:
        sample, position = divmod(boundary, length)
        if position and sample < num_samples:
            samples[sample].append(position)
    return tuple(tuple(dict.fromkeys(starts)) for starts in samples)
