"""Ends this process where it hangs: what waits in a collective can be ended by nothing else.

A thread waits while the main thread works.  On rank 0 it hears the others' answers, and concludes when all are there,
when one has failed, or when time is up; on the others it waits for rank 0's conclusion.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from .finding import error_line

#: Seconds in which the main thread may still end by itself after the conclusion.
GRACE = 3.0


class Watch:
    """A daemon thread that runs ``conclude``, and ends the process with its result where the main thread hangs."""

    def __init__(
        self, conclude: Callable[[], int], grace: float = GRACE, end: Callable[[int], None] = os._exit
    ) -> None:
        self._conclude, self._grace, self._end = conclude, grace, end
        self._free = threading.Event()
        self._status = 1
        self._thread = threading.Thread(target=self._run, daemon=True, name="sla-doctor watch")
        self._thread.start()

    def finish(self) -> int:
        """The main thread does not hang: what ``conclude`` returns, as soon as it does."""
        self._free.set()
        self._thread.join()
        return self._status

    def _run(self) -> None:
        try:
            self._status = self._conclude()
        except (TimeoutError, RuntimeError) as error:
            # Rank 0 is gone, and its store with it.
            print(f"sla-doctor: no conclusion was heard: {error_line(error)}", file=sys.stderr, flush=True)
            self._status = 1
        if not self._free.wait(self._grace):
            self._end(self._status)
