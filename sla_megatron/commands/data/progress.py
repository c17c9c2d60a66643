"""What is said on stderr while something takes long: how far a job is, and what is waited for.

On a terminal it is one line that is drawn anew.  Elsewhere, in a log, each time is a line of its own: one a second in
the first minute, in which something may be wrong, then one every ten seconds.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    from .shards import Advance, ShardRecord

_MINUTE = 60.0
_TERMINAL_SECONDS, _FIRST_MINUTE_SECONDS, _LOG_SECONDS = 0.2, 1.0, 10.0


class _Lines:
    """``stream``, on which what would be drawn over the line before is a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text := text.strip():
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


@contextlib.contextmanager
def bar(desc: str, total: float | None = None, unit: str = "B", **more: Any) -> Iterator[tqdm]:
    """A tqdm bar that is shown at once, and again in time, whether it has moved or not."""
    terminal, begun, over = sys.stderr.isatty(), time.monotonic(), threading.Event()
    stream = sys.stderr if terminal else _Lines(sys.stderr)

    def draw(drawn: tqdm) -> None:
        while True:
            late = _LOG_SECONDS if time.monotonic() - begun > _MINUTE else _FIRST_MINUTE_SECONDS
            if over.wait(_TERMINAL_SECONDS if terminal else late):
                return
            drawn.refresh()

    # It never draws itself: a document that takes a minute would keep it from that.
    with tqdm(desc=desc, total=total, unit=unit, unit_scale=True, file=stream, mininterval=math.inf, **more) as drawn:
        thread = threading.Thread(target=draw, args=(drawn,), daemon=True)
        thread.start()
        try:
            yield drawn
        finally:
            over.set()
            thread.join()


@contextlib.contextmanager
def waiting_for(what: str, quick: bool = False) -> Iterator[None]:
    """Within the block, say ``what`` is being done and for how long; ``quick``: only if it has not ended soon.

    On a terminal nothing of it stays.
    """
    over = threading.Event()

    def show() -> None:
        if not over.wait(0.5):
            with shown():
                over.wait()

    def shown() -> contextlib.AbstractContextManager[tqdm]:
        return bar(what, bar_format="sla-data: {desc}, {elapsed_s:.0f} s", leave=False)

    if not quick:
        with shown():
            yield
        return
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Progress:
    """A bar over the inputs' work.

    Args:
        drawn: the bar.
        finished: shards of an earlier run, which count as done but not in the rates.
    """

    def __init__(self, drawn: tqdm, finished: Iterable[ShardRecord]) -> None:
        finished = list(finished)
        self._bar = drawn
        self.documents = sum(record.documents for record in finished)
        self.tokens = sum(record.tokens for record in finished)
        self._work = sum(record.work for record in finished)
        self._before, self._begun = self.documents, time.monotonic()
        #: Of blocks that are not finished, how far they are, and their part of the work.
        self._underway: dict[int, tuple[Advance, float]] = {}
        self._workers = ""
        self._show()

    def add(self, record: ShardRecord) -> None:
        """Count a shard that has just been finished."""
        self._underway.pop(record.number, None)
        self.documents += record.documents
        self.tokens += record.tokens
        self._work += record.work
        self._show()

    def advance(self, advance: Advance, work: float) -> None:
        """Count what a worker has done of a block, whose part of the inputs' work is ``work``."""
        self._underway[advance.number] = advance, work
        self._show()

    def staff(self, ready: int, started: int, most: int) -> None:
        """Show how many workers there are, and how many still build their tokenizers."""
        starting = f", {started - ready} starting" if ready < started else ""
        self._workers = f", {started} of {most} workers{starting}"
        self._show()

    def _show(self) -> None:
        underway = self._underway.values()
        documents = self.documents + sum(advance.documents for advance, _ in underway)
        tokens = self.tokens + sum(advance.tokens for advance, _ in underway)
        rate = (documents - self._before) / max(time.monotonic() - self._begun, 1e-9)
        self._bar.set_postfix_str(
            f"{documents:,} documents, {rate:,.0f}/s, {tokens:,} tokens{self._workers}", refresh=False
        )
        self._bar.update(self._work + sum(advance.share * work for advance, work in underway) - self._bar.n)
