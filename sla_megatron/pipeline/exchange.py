"""How long pipeline neighbours take for a payload, in the ways in which Megatron's schedules send it.

Both ways at once: a rank sends forward and receives a gradient from the same neighbour, as 1F1B does between a forward
and a backward pass.  And one way at a time, as while a pipeline fills and drains.  Through Megatron's own communicator
and the job's own groups: batched or not, as its flags say.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..upstream.seams import Reliance

#: Elements of the small message, whose time is the latency.
SMALL = 1
#: Exchanges that are timed, of each size and pair: as many as take this long, and at least and at most so many.
_SECONDS, _LEAST, _MOST = 1.0, 5, 100
#: Exchanges before those that count: connections are made in the first.
_WARMUP = 3

NEIGHBOURS = tuple(
    Reliance(
        f"megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator.{name}",
        "called by sla-doctor --rates as Megatron's schedules call it",
        ("self", *parameters),
    )
    for name, parameters in {
        "send_forward_recv_backward": ("output_tensors", "tensor_shapes", "is_last_stage"),
        "send_backward_recv_forward": ("input_tensor_grads", "tensor_shapes", "is_first_stage"),
        "send_forward": ("output_tensors", "is_last_stage"),
        "recv_forward": ("tensor_shapes", "is_first_stage"),
        "send_backward": ("input_tensor_grads", "is_first_stage"),
        "recv_backward": ("tensor_shapes", "is_last_stage"),
    }.items()
)


@dataclass(frozen=True)
class Seconds:
    """What a tensor takes between two neighbours.

    Attributes:
        one_way: half of a round trip.
        both_ways: as many bytes in each direction, at once.
    """

    one_way: float
    both_ways: float


def neighbour_seconds(config: Any, elements: int, with_ring: bool) -> dict[int, Seconds]:
    """Medians for a tensor of ``elements``, by the pipeline rank that sends forward; of this rank's own pairs, of which
    it is the one that sends forward.

    All ranks of the job call it, and pairs that have no rank in common exchange at once.

    Args:
        config: the model's ``TransformerConfig``; it says how ranks communicate, and in which type.
        elements: of one tensor.
        with_ring: whether the last rank sends forward to the first one too, as with virtual stages.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    group = parallel_state.get_pipeline_model_parallel_group()
    rank, size = group.rank(), group.size()
    config = copy.copy(config)
    # Shapes are known, and nobody listens.
    config.variable_seq_lengths, config.timers = False, None
    link = P2PCommunicator(group, config)
    tensor = torch.zeros(elements, dtype=config.pipeline_dtype, device=torch.cuda.current_device())
    shape = tensor.shape

    def both_ways(sends_forward: bool) -> None:
        if sends_forward:
            link.send_forward_recv_backward(tensor, shape, False)
        else:
            link.send_backward_recv_forward(tensor, shape, False)

    def round_trip(sends_forward: bool) -> None:
        if sends_forward:
            link.send_forward(tensor, False)
            link.recv_backward(shape, False)
        else:
            link.recv_forward(shape, False)
            link.send_backward(tensor, False)

    found = {}
    hops = [*range(size - 1), *([size - 1] if with_ring and size > 2 else [])]
    for turn in _turns(hops, size):
        mine = [hop for hop in turn if rank in (hop, (hop + 1) % size)]
        sends_forward = mine[0] == rank if mine else None
        trip, both = (_timed(way, sends_forward) for way in (round_trip, both_ways))
        if sends_forward:
            found[rank] = Seconds(trip / 2, both)
    return found


def _turns(hops: list[int], size: int) -> list[list[int]]:
    """``hops`` of a ring of ``size`` ranks in as few turns as keep each rank to one hop a turn."""
    turns: list[list[int]] = []
    for hop in hops:
        ends = {hop, (hop + 1) % size}
        free = (turn for turn in turns if all(ends.isdisjoint({other, (other + 1) % size}) for other in turn))
        if (turn := next(free, None)) is None:
            turns.append(turn := [])
        turn.append(hop)
    return turns


def _timed(exchange: Callable[[bool], None], sends_forward: bool | None) -> float:
    """Median seconds of ``exchange``; ``sends_forward`` is ``None`` where this rank has no part in it."""
    import torch

    def timed() -> float:
        start = time.perf_counter()
        if sends_forward is not None:
            exchange(sends_forward)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    torch.distributed.barrier()
    first = statistics.median(timed() for _ in range(_WARMUP))
    # All take as many.
    slowest = torch.tensor(first, device=torch.cuda.current_device())
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    count = min(_MOST, max(_LEAST, int(_SECONDS / max(float(slowest), 1e-6))))
    return statistics.median(timed() for _ in range(count))
