"""The iterations that Megatron logs, found from the end of a file, or from its beginning, in bounded memory.

The last rank prints them; the first prints all arguments (``_print_args`` in megatron/training/arguments.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ....common.megatron_log import progress_line

#: What is read at a time; how far from either end an iteration, and arguments, are looked for.
_BLOCK, _FARTHEST = 1 << 18, 1 << 22

# It begins with a word that is found fast.
_BEGIN = re.compile(rb"iteration +\d+/ *\d+ \|")
_TIME = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?)\]")
_ARGUMENT = re.compile(rb"^  (\w+) \.* *(\S.*)$", re.MULTILINE)
_ARGUMENTS_BEGIN, _ARGUMENTS_END = b"-- arguments --", b"-- end of arguments --"


@dataclass(frozen=True)
class Step:
    """One logged iteration of ``last``; ``seconds`` is the time of one since the line before, ``batch`` in samples,
    ``samples`` since the run's beginning, ``time`` in seconds of the clock of who logged it."""

    iteration: int
    last: int | None = None
    loss: float | None = None
    seconds: float | None = None
    batch: float | None = None
    samples: float | None = None
    time: float | None = None


def step_of(line: str) -> Step | None:
    """Read the line of one iteration; None is another line."""
    found = progress_line(line)
    if found is None:
        return None

    def value(name: str) -> float | None:
        return float(found.values[name]) if name in found.values else None

    milliseconds, stamp = value("elapsed time per iteration (ms)"), _TIME.search(line)
    return Step(
        iteration=found.iteration,
        last=found.last,
        loss=value("lm loss"),
        seconds=None if milliseconds is None else milliseconds / 1000,
        batch=value("global batch size"),
        samples=value("consumed samples"),
        time=datetime.fromisoformat(stamp[1]).timestamp() if stamp else None,
    )


def last_step(path: Path) -> Step | None:
    """The last iteration that was logged to ``path``, or None."""
    return _first_of(_blocks_from_the_end(path), newest=True)


def first_step(path: Path) -> Step | None:
    """The first one, or None."""
    return _first_of(_blocks(path), newest=False)


def _first_of(blocks: Iterator[bytes], newest: bool) -> Step | None:
    for block in blocks:
        places = [found.start() for found in _BEGIN.finditer(block)]
        if places:
            place = places[-1 if newest else 0]
            end = block.find(b"\n", place)
            line = block[block.rfind(b"\n", 0, place) + 1 : end if end >= 0 else None]
            return step_of(line.decode(errors="replace"))
    return None


def printed_arguments(path: Path) -> dict[str, str]:
    """Megatron's arguments by name, as their values were printed to ``path``; empty where they were not."""
    text = b""
    for block in _blocks(path):
        text += block
        begin, end = text.find(_ARGUMENTS_BEGIN), text.find(_ARGUMENTS_END)
        if 0 <= begin < end:
            pairs = _ARGUMENT.findall(text[begin:end])
            return {name.decode(): value.decode(errors="replace").rstrip() for name, value in pairs}
        # Of what is no argument, only as much is kept as may be the beginning of them.
        text = text[begin:] if begin >= 0 else text[-len(_ARGUMENTS_BEGIN) :]
    return {}


def tail(path: Path, size: int, begin: int = 0, end: int | None = None) -> str:
    """The last ``size`` bytes of ``path``, or of its part from ``begin`` to ``end``; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2) if end is None else end
            file.seek(max(begin, end - size))
            return file.read(max(0, end - file.tell())).decode(errors="replace")
    except OSError:
        return ""


def _blocks(path: Path) -> Iterator[bytes]:
    """Whole lines of ``path``, a block at a time."""
    rest = b""
    with path.open("rb") as file:
        for _ in range(_FARTHEST // _BLOCK):
            block = file.read(_BLOCK)
            if not block:
                break
            whole, newline, after = block.rpartition(b"\n")
            if newline:
                yield rest + whole
                rest = after
            else:
                # A line without an end is no iteration: of such a one its end is enough.
                rest = (rest + block)[-_BLOCK:]


def _blocks_from_the_end(path: Path) -> Iterator[bytes]:
    """Whole lines of ``path``, a block at a time, the last first.  What follows the last line's end is left out."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        least, rest = max(0, end - _FARTHEST), b""
        while end > least:
            begin = max(least, end - _BLOCK)
            file.seek(begin)
            block = file.read(end - begin) + rest
            if not rest:
                block = block[: block.rfind(b"\n") + 1]
            end = begin
            # The first line may have begun before.
            rest, newline, whole = block.partition(b"\n") if begin else (b"", b"\n", block)
            rest = (rest + newline)[-_BLOCK:]
            yield whole
