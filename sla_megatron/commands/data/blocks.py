"""A source of text cut into blocks: the same blocks whoever works on them, and whenever.

Where a block ends depends on the text after its start alone, so work can go on from the end of any block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

_CHUNK = 1 << 20
_NEWLINE, _RETURN = b"\n", b"\r"


@dataclass(frozen=True)
class Cut:
    """A piece of one source.

    ``start`` and ``end`` are positions in the source: bytes (of the text, not of a compressed file) or rows.
    ``payload`` holds the text, or is None for one document that is larger than allowed: it has ``too_large`` bytes, its
    line end not counted.
    """

    start: int
    end: int
    payload: bytes | None
    too_large: int = 0


@dataclass(frozen=True)
class Block:
    """A cut with its place among all of the input: ``number`` from 0 on, ``source`` an index into the sources.

    ``last``: the source has nothing after it. ``work``: its part of the source's ``work``.
    """

    number: int
    source: int
    start: int
    end: int
    payload: bytes | None
    last: bool
    work: float
    too_large: int = 0


def cut_lines(read: Callable[[int], bytes], block_bytes: int, limit: int, start: int) -> Iterator[Cut]:
    """Cut what ``read(n)`` gives, from position ``start`` on, at the first line end after ``block_bytes``.

    A line that goes on for more than ``limit`` bytes after that is a cut of its own, without payload: memory stays
    below ``block_bytes + limit`` whatever the lines are.
    """
    held, searched = bytearray(), block_bytes - 1
    while True:
        end = held.find(_NEWLINE, searched)
        searched = max(block_bytes - 1, len(held))
        if end < 0 and len(held) <= block_bytes + limit:
            chunk = read(_CHUNK)
            if chunk:
                held += chunk
                continue
            if held:
                yield Cut(start, start + len(held), bytes(held))
            return
        if end < 0 or end > block_bytes + limit:
            # The line across the border is too long: what is before it, then the line.
            end = held.rfind(_NEWLINE, 0, block_bytes - 1)
            if end < 0:
                size, text = _drop_line(read, held)
                yield Cut(start, start + size, None, text)
                start, searched = start + size, block_bytes - 1
                continue
        yield Cut(start, start + end + 1, bytes(held[: end + 1]))
        del held[: end + 1]
        start, searched = start + end + 1, block_bytes - 1


def _drop_line(read: Callable[[int], bytes], held: bytearray) -> tuple[int, int]:
    """Remove the line at the start of ``held`` from it and from what follows; its bytes with and without line end."""
    size, returned = 0, False
    while (end := held.find(_NEWLINE)) < 0:
        size, returned = size + len(held), held.endswith(_RETURN)
        held[:] = read(_CHUNK)
        if not held:
            return size, size - returned
    size, returned = size + end, held.endswith(_RETURN, 0, end) if end else returned
    del held[: end + 1]
    return size + 1, size - returned


def cut_whole(read: Callable[[int], bytes], limit: int, start: int) -> Iterator[Cut]:
    """The whole of what ``read(n)`` gives as one cut, without payload beyond ``limit`` bytes."""
    held, size = bytearray(), 0
    while chunk := read(_CHUNK):
        size += len(chunk)
        if size <= limit:
            held += chunk
        else:
            held.clear()
    if size and not start:
        yield Cut(0, size, bytes(held)) if size <= limit else Cut(0, size, None, size)
