"""How long the forward and backward passes of the job's own stages take, in Megatron's own schedule, on all ranks at
once: with what they share, and without the time in which they wait for each other."""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from typing import Any

from ...pipeline.pass_timers import PassTimers
from .finding import Skipped

#: Seconds that the passes may take that count, and how many batches of them there are.
_SECONDS, _LEAST, _MOST = 20.0, 2, 3
#: Microbatches of a batch, for each pipeline rank: of them a few find the pipeline filling or draining, most do not.
_A_RANK = 4


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
