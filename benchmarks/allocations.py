"""Bytes that torch allocates within a block: what is left at its end, and the most there was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Allocations:
    """Bytes beyond those at the beginning of the block; known at its end.

    Attributes:
        kept: at the end.
        peak: at most.
    """

    kept: int = 0
    peak: int = 0


@contextmanager
def allocations(device: str) -> Iterator[Allocations]:
    """Count allocations within the block: the CUDA allocator's own figures, or on the CPU each event of torch's.

    The CPU's are exact as well, and leave out what is not torch's; they slow the block down.
    """
    import torch

    found = Allocations()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        torch.cuda.synchronize()
        found.kept = torch.cuda.memory_allocated() - before
        found.peak = torch.cuda.max_memory_allocated() - before
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profile:
        yield found
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        found.kept += event.nbytes()
        found.peak = max(found.peak, found.kept)
