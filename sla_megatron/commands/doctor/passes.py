"""How long the forward and backward passes of the job's own stages take, in Megatron's own schedule, on all ranks at
once: with what they share, and without the time in which they wait for each other."""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from typing import Any

from ...upstream.seams import Reliance
from .finding import Skipped

#: Seconds that the passes may take that count, and how many batches of them there are.
_SECONDS, _LEAST, _MOST = 20.0, 2, 5
#: Microbatches of a batch, for each pipeline rank: of them a few find the pipeline filling or draining, most do not.
_A_RANK = 4

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
        import torch

        torch.cuda.synchronize()
        starts, ends = self._moments[::2], self._moments[1::2]
        self._moments = []
        if self._on_gpu:
            return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]
        return [end - start for start, end in zip(starts, ends, strict=True)]


def pass_seconds(args: Namespace, model: list[Any], schedule: Any) -> list[tuple[float, float]]:
    """Seconds of a forward and of a backward pass of each of this rank's virtual stages.

    Of each batch the mean of its passes counts, since a step is a sum of them; of the batches the median.

    Args:
        args: the job's, with the sizes of its own microbatches.
        model: of :func:`layout.build`, made of ``args``.
        schedule: a :class:`~sla_megatron.pipeline.schedule.Schedule` of the job's pipeline.
    """
    from dataclasses import replace

    import torch
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config

    from ...cpu.backend import cpu_backend_is_active
    from .layout import run_batch
    from .tiny import num_microbatches

    if args.overlap_moe_expert_parallel_comm:
        raise Skipped("--overlap-moe-expert-parallel-comm: passes run into each other, and are not timed")
    config = get_model_config(model[0])
    fewest = num_microbatches(args)
    config.timers = timers = PassTimers(not cpu_backend_is_active())
    start = time.perf_counter()
    run_batch(args, model, fewest)
    timers.taken()
    # Compilation and the first use of every kernel are in it: more than what is to come.
    slowest = torch.tensor(time.perf_counter() - start, device=torch.cuda.current_device())
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    affordable = _SECONDS / _LEAST / max(float(slowest), 1e-6) * fewest
    wanted = min(schedule.num_microbatches, _A_RANK * schedule.pipeline_size, int(affordable))
    count = max(fewest, wanted // fewest * fewest)
    batches = min(_MOST, max(_LEAST, int(affordable / count * _LEAST)))
    rank = parallel_state.get_pipeline_model_parallel_rank()
    order = list(replace(schedule, num_microbatches=count).passes(rank))
    means: dict[tuple[str, int], list[float]] = {}
    for _ in range(batches):
        run_batch(args, model, count)
        taken = dict(zip("FB", timers.taken(), strict=True))
        for kind, seconds in taken.items():
            chunks = [one.chunk for one in order if one.kind == kind]
            for chunk in range(schedule.num_chunks):
                its = [each for each, of in zip(seconds, chunks, strict=True) if of == chunk]
                means.setdefault((kind, chunk), []).append(statistics.fmean(its))
    config.timers = None
    return [
        (statistics.median(means["F", chunk]), statistics.median(means["B", chunk]))
        for chunk in range(schedule.num_chunks)
    ]
