"""What every rank of ``transport`` runs: both models of one layout, in turns, then the transfers of each hop."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from typing import Any

from .allocations import allocations
from .hop_bytes import HopBytes, hop_bytes
from .pipeline_listening import Heard, heard, live_kv
from .pipeline_models import Shape, build, job_of, train_step
from .record import spread
from .transfers import transfer_seconds

MODELS = ("dense", "sla")


def start(device: str) -> None:
    """Join the other ranks."""
    import torch

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")


def measure(args: Namespace, shape: Shape, device: str) -> dict[str, Any]:
    """The row of one layout, the same on every rank."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=shape.ranks,
        virtual_pipeline_model_parallel_size=shape.chunks if shape.chunks > 1 else None,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    models = {name: build(shape, dtype, name == "sla") for name in MODELS}
    times, last = timed_steps(args, shape, models, device)
    hops = hop_bytes(shape, dtype.itemsize)
    sent = _gathered([_per_hop(shape, last[name]) for name in MODELS])
    row = {
        "layout": shape.name,
        "pipeline_size": shape.ranks,
        "virtual_stages": shape.chunks,
        "distance": shape.distance,
        "dtype": str(dtype).removeprefix("torch."),
        "num_steps": args.steps,
        "seconds": {name: spread(times[name]) for name in MODELS},
        "ratio": spread([sla / dense for sla, dense in zip(times["sla"], times["dense"], strict=True)]),
        "sent_bytes": {name: sum(_gathered(last[name].sent_bytes)) for name in MODELS},
        "synchronisations": {name: sum(_gathered(last[name].synchronisations)) for name in MODELS},
        "hops": [hop_row(args, hop, sent, device) for hop in hops],
        "ranks": memory_rows(shape, models, job_of(shape, dtype.itemsize), device),
    }
    del models
    parallel_state.destroy_model_parallel()
    return row


def timed_steps(
    args: Namespace, shape: Shape, models: dict[str, Any], device: str
) -> tuple[dict[str, list[float]], dict[str, Heard]]:
    """Steps of both models in turns: the seconds of each but the first ones, and what the last one of each did."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in MODELS}
    last: dict[str, Heard] = {}
    for step in range(args.warmup + args.steps):
        for name in MODELS if step % 2 else MODELS[::-1]:
            torch.distributed.barrier()
            with heard() as last[name]:
                begin = time.perf_counter()
                train_step(models[name], shape)
                if device == "cuda":
                    torch.cuda.synchronize()
                torch.distributed.barrier()
            if step >= args.warmup:
                times[name].append(time.perf_counter() - begin)
    return times, last


def hop_row(args: Namespace, hop: HopBytes, sent: list[list[dict[str, Any]]], device: str) -> dict[str, Any]:
    """Bytes of one hop, measured and computed, and the seconds of a transfer of each way's payload."""
    # A payload's bytes must be the same for every microbatch.
    row = hop.as_row() | {
        "sent_bytes": {
            name: {
                "forward": sent[hop.source_rank][each]["next"].get(str(hop.hop), []),
                "backward": sent[hop.target_rank][each]["prev"].get(str(hop.hop), []),
            }
            for each, name in enumerate(MODELS)
        }
    }
    seconds = transfer_seconds(hop.sizes, hop.source_rank, hop.target_rank, args.transfers, args.warmup, device)
    pairs = {name: zip(seconds[name], seconds["sla"], strict=True) for name in seconds if name != "sla"}
    return row | {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        # How much longer than ours each other way takes, pair by pair.
        "seconds_over_sla": {name: spread([other / ours for other, ours in both]) for name, both in pairs.items()},
    }


def _per_hop(shape: Shape, step: Heard) -> dict[str, dict[str, list[int]]]:
    """Hop -> the different sizes, in bytes, of what this rank sent over it, ascending; forward and backward.

    The k-th tensor is that of the k-th pass that sends.
    """
    import torch

    from sla_megatron.pipeline.schedule import Schedule

    rank = torch.distributed.get_rank()
    schedule = Schedule(shape.ranks, shape.chunks, shape.microbatches)
    stages = {
        "next": [chunk * shape.ranks + rank for _, chunk, _ in schedule.forwards()],
        "prev": [chunk * shape.ranks + rank for _, chunk, _ in schedule.backwards()],
    }
    hops = {
        "next": [stage for stage in stages["next"] if stage != shape.stages - 1],
        "prev": [stage - 1 for stage in stages["prev"] if stage != 0],
    }
    found: dict[str, dict[str, list[int]]] = {}
    for direction, order in hops.items():
        sizes: dict[str, set[int]] = {}
        for hop, size in zip(order, step.sent[direction], strict=True):
            sizes.setdefault(str(hop), set()).add(size)
        found[direction] = {hop: sorted(its) for hop, its in sizes.items()}
    return found


def memory_rows(shape: Shape, models: dict[str, Any], job: Any, device: str) -> list[dict[str, Any]]:
    """Each rank's K/V that wait for another stage at the schedule's peak, and the most that a step of it allocates."""
    import torch

    from sla_megatron.commands.plan.traffic import rank_memory

    with live_kv() as live:
        train_step(models["sla"], shape)
    peaks = {}
    for name in MODELS:
        torch.distributed.barrier()
        with allocations(device) as allocated:
            train_step(models[name], shape)
        peaks[name] = allocated.peak
    measured = _gathered((live.peak, peaks))
    return [
        {
            "rank": planned.rank,
            "resident_bytes": resident,
            "resident_planned_bytes": planned.resident_bytes,
            "step_peak_bytes": peak,
        }
        for planned, (resident, peak) in zip(rank_memory(job), measured, strict=True)
    ]


def _gathered(value: Any) -> list[Any]:
    """Every rank's value."""
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
