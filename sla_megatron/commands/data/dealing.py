"""Text dealt out to tasks: by size, whole files where they are small, the same for the same files."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .sources import Piece, Source


@dataclass(frozen=True)
class Share:
    """What one task gets of one source: its place in the input, and from where to where it goes.

    ``end`` is None for a source that goes to one task as a whole; ``work`` is in the source's unit.
    """

    source: int
    start: int
    end: int | None
    work: float

    def of(self, source: Source) -> Source:
        """This part of ``source``, which is the one that is meant."""
        return source if self.end is None else Piece(source, self.start, self.end)


def deal(sources: Sequence[Source], tasks: int, block_bytes: int) -> list[list[Share]]:
    """The shares of at most ``tasks`` tasks, each in the order of the input; every byte or row is in one of them.

    The largest share first goes to the task with the least work.  A source that is larger than an equal share of
    everything is cut, where it can be read from its middle.

    Args:
        sources: all of the input.
        tasks: at most; without text for all of them there are fewer, one at least.
        block_bytes: files are cut into pieces no smaller than this.
    """
    equal = sum(source.work or 0 for source in sources) / tasks
    shares = [share for number, source in enumerate(sources) for share in _cut(number, source, equal, block_bytes)]
    shares.sort(key=lambda share: (-share.work, share.source, share.start))
    loads = [(0.0, task) for task in range(tasks)]
    dealt: list[list[Share]] = [[] for _ in range(tasks)]
    for share in shares:
        load, task = heapq.heappop(loads)
        dealt[task].append(share)
        heapq.heappush(loads, (load + share.work, task))
    return [sorted(own, key=lambda share: (share.source, share.start)) for own in dealt if own]


def _cut(number: int, source: Source, equal: float, block_bytes: int) -> list[Share]:
    work = source.work or 0.0
    least = block_bytes if source.unit == "B" else 1
    pieces = min(math.ceil(work / equal), int(work / least)) if equal else 1
    borders = source.borders(pieces) if pieces > 1 else []
    if not borders:
        return [Share(number, 0, None, work)]
    edges = [0, *borders, int(work)]
    return [Share(number, start, end, float(end - start)) for start, end in zip(edges, edges[1:], strict=False)]
