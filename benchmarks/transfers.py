"""How long a transfer of so many bytes takes between two ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping


def transfer_seconds(
    sizes: Mapping[str, int], source: int, target: int, rounds: int, warmup: int, device: str
) -> dict[str, list[float]]:
    """Seconds of ``rounds`` transfers of each of ``sizes``, on every rank; collective.

    A tensor goes from ``source`` to ``target`` and comes back, as a payload and its gradient do; half of that is one
    transfer.  The sizes take turns, in an order that rotates.

    Args:
        sizes: name -> bytes.
        source, target: ranks of the default process group; the others wait.
        rounds: of each size, that are timed.
        warmup: rounds before them.
        device: ``cpu`` or ``cuda``.
    """
    import torch
    import torch.distributed as dist

    tensors = {name: torch.zeros(size, dtype=torch.uint8, device=device) for name, size in sizes.items()}
    found: dict[str, list[float]] = {name: [] for name in sizes}
    names = list(sizes)
    for turn in range(warmup + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            dist.barrier()
            seconds = _round_trip(tensors[name], source, target, device) / 2
            if turn >= warmup:
                found[name].append(seconds)
    shared = [found]
    dist.broadcast_object_list(shared, src=source)
    return shared[0]


def _round_trip(tensor: object, source: int, target: int, device: str) -> float:
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    if rank not in (source, target):
        return 0.0
    start = time.perf_counter()
    steps = (dist.send, dist.recv) if rank == source else (dist.recv, dist.send)
    for step in steps:
        step(tensor, target if rank == source else source)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
