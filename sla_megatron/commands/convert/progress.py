"""How far a conversion is, on stderr: a bar on a terminal, a line now and then elsewhere.

What counts is how much lies in the result's folder, whoever writes it: Megatron's writer says nothing while it does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

#: Between two lines of a log file, and between two looks of a bar.
LOG_SECONDS, BAR_SECONDS = 10.0, 0.2
_LINE = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"


@contextmanager
def progress(out: Path, folder: Path, total: int) -> Iterator[None]:
    """Within the block, show how much is in ``folder``.

    Args:
        out: the result's name, to be shown.
        folder: where it is written.
        total: its bytes, about.
    """
    ended = Event()
    watcher = Thread(target=_watch, args=(f"writing {out}", folder, total, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(what: str, folder: Path, total: int, ended: Event) -> None:
    units: Any = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    if sys.stderr.isatty():
        with tqdm(desc=what, total=total, **units) as bar:
            while not ended.wait(BAR_SECONDS):
                bar.update(min(_size(folder), total) - bar.n)
            bar.update(min(_size(folder), total) - bar.n)
        return
    begun = time.monotonic()
    while not ended.wait(LOG_SECONDS):
        done, spent = min(_size(folder), total), time.monotonic() - begun
        print(tqdm.format_meter(done, total, spent, prefix=what, bar_format=_LINE, **units), file=sys.stderr)


def _size(folder: Path) -> int:
    """Of all files; one that goes meanwhile has none."""
    sizes = 0
    for at, _, files in os.walk(folder):
        for name in files:
            try:
                sizes += os.stat(os.path.join(at, name)).st_size
            except OSError:
                continue
    return sizes
