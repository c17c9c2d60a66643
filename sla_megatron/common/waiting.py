"""What is said on stderr while something takes long: how far it is, or what is waited for.

On a terminal it is one line that is drawn anew.  Elsewhere, in a log, each time is a line of its own: one a second in
the first minute, in which something may be wrong, then one every ten seconds.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm

_MINUTE = 60.0
# A library that is loaded may hold Python's lock for a while: less than a second, for one in each.
_TERMINAL_SECONDS, _FIRST_MINUTE_SECONDS, _LOG_SECONDS = 0.2, 0.8, 10.0


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
def waiting_for(command: str, what: str, quick: bool = False) -> Iterator[None]:
    """Within the block, say that ``command`` is ``what``, and for how long; ``quick``: only if it has not ended soon.

    On a terminal nothing of it stays.
    """
    over = threading.Event()

    def show() -> None:
        if not over.wait(0.5):
            with shown():
                over.wait()

    def shown() -> contextlib.AbstractContextManager[tqdm]:
        return bar(f"{command}: {what}", bar_format="{desc}, {elapsed_s:.0f} s", leave=False)

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
