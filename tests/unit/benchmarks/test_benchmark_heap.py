"""benchmarks/heap.py, against what the system counts."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from benchmarks.record import ROOT

_PAGES_OF_SECOND_USE = """
import resource, sys
import numpy
from benchmarks.heap import keep_freed_memory
assert sys.argv[1] == "default" or keep_freed_memory()
def used():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.empty(64 << 20, numpy.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
used()
print(used())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept() -> None:
    """The same 64 MB once more: all pages anew by default, hardly any when they are kept."""
    pages = {}
    for how in ("default", "kept"):
        command = [sys.executable, "-c", _PAGES_OF_SECOND_USE, how]
        pages[how] = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    # Huge pages, where the system gives them, are 2 MB each.
    assert pages["default"] >= 32 > 8 > pages["kept"]
