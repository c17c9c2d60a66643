"""Lines for the terminal, and a word where there was none for a while."""

from __future__ import annotations

import threading
import time
from types import TracebackType

#: Seconds without a line after which one says what is being done.
QUIET_SECONDS = 5.0


class Progress:
    """Within the block, prints what it is given; while that is nothing, what is being done, and since when.

    Attributes:
        doing: what takes the time now, in words; may be changed whenever that changes.
    """

    def __init__(self, name: str, doing: str) -> None:
        self.doing = doing
        self._name, self._begun = name, time.monotonic()
        self._spoken, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over = True
        self._spoken.set()
        self._thread.join()

    def say(self, line: str) -> None:
        """Print ``line``."""
        print(line, flush=True)
        self._spoken.set()

    def _watch(self) -> None:
        while not self._over:
            if self._spoken.wait(QUIET_SECONDS):
                self._spoken.clear()
            else:
                print(f"{self._name:>6} {time.monotonic() - self._begun:4.0f} s: {self.doing}", flush=True)
