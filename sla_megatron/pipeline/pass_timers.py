"""Forward and backward passes timed one by one, where Megatron's schedules call a timer."""

from __future__ import annotations

import time
from typing import Any

from ..upstream.seams import Reliance

TIMERS = tuple(
    Reliance(
        f"megatron.core.pipeline_parallel.schedules:{name}",
        "sla-doctor --rates: starts and stops config.timers('forward-compute') or ('backward-compute') around a pass",
    )
    for name in ("forward_step", "backward_step")
)


class PassTimers:
    """Stands for Megatron's timers in ``config.timers``; notes how long each pass takes, in order.

    On a GPU the host does not wait for it: what is noted are events, on the stream that waits for what arrives too.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._others = _Ignored()
        self._named = {f"{kind}-compute": _Intervals(on_gpu) for kind in ("forward", "backward")}

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        return self._named.get(name, self._others)

    def taken(self) -> tuple[list[float], list[float]]:
        """Seconds of the forward and of the backward passes since it was last asked."""
        forward, backward = (each.taken() for each in self._named.values())
        return forward, backward


class _Ignored:
    def start(self, barrier: bool = False) -> None:
        pass

    stop = start


class _Intervals:
    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._moments: list[Any] = []

    def start(self, barrier: bool = False) -> None:
        self._moments.append(self._now())

    stop = start

    def _now(self) -> Any:
        import torch

        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def taken(self) -> list[float]:
        starts, ends = self._moments[::2], self._moments[1::2]
        self._moments = []
        if not self._on_gpu:
            return [end - start for start, end in zip(starts, ends, strict=True)]
        import torch

        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]
