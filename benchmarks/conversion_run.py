"""One conversion, or the copy of the same files, in a process of its own, which prints its figures as JSON.

    python -P benchmarks/conversion_run.py convert megatron-to-hf SOURCE RESULT
    python -P benchmarks/conversion_run.py copy - SOURCE RESULT

It imports nothing of this folder, so that it can measure the ``sla_megatron`` of another checkout (``PYTHONPATH``).
"""

from __future__ import annotations

import contextlib
import importlib._bootstrap
import io
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_COPIED_AT_ONCE = 2**24


def main() -> None:
    """Do it, have all that was written on the disk, print the figures."""
    way, direction, source, result = sys.argv[1:]
    # The interpreter's own start is part of the imports.
    imports, begun = ImportClock(cpu_seconds()), time.perf_counter()
    copy(Path(source), Path(result)) if way == "copy" else convert(direction, source, result, imports)
    for path in Path(result).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    # Megatron's writer leaves a helper, whose seconds count once it has ended.
    for helper in multiprocessing.active_children():
        helper.terminate()
        helper.join()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds(),
        "import_seconds": imports.seconds,
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    print(json.dumps(figures))


def cpu_seconds() -> float:
    """Of this process, all threads, and of its children that have ended, in user and kernel mode."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


class ImportClock:
    """CPU seconds within imports, whoever makes them, beside ``seconds`` to begin with."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._depth = seconds, 0

    @contextlib.contextmanager
    def running(self) -> Any:
        """Within the block every import counts."""
        # Each module that is not there yet is found and loaded by this function, importlib's callers included.
        original: Callable[..., Any] = importlib._bootstrap._find_and_load

        def find_and_load(*args: Any) -> Any:
            self._depth += 1
            begun = time.process_time()
            try:
                return original(*args)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.process_time() - begun

        importlib._bootstrap._find_and_load = find_and_load
        try:
            yield
        finally:
            importlib._bootstrap._find_and_load = original


def convert(direction: str, source: str, result: str, imports: ImportClock) -> None:
    """``sla-convert DIRECTION SOURCE RESULT``."""
    with imports.running(), contextlib.redirect_stdout(io.StringIO()):
        from sla_megatron.commands.convert import cli

        sys.argv = ["sla-convert", direction, source, result]
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"sla-convert ended with status {end.code}") from end


def copy(source: Path, result: Path) -> None:
    """Every byte of ``source``'s files read and written."""
    for path in sorted(source.rglob("*")):
        target = result / path.relative_to(source)
        if path.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as before, target.open("wb") as after:
            while part := before.read(_COPIED_AT_ONCE):
                after.write(part)


if __name__ == "__main__":
    main()
