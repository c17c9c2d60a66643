"""How long pipeline neighbours take to exchange a payload, in the way in which Megatron's schedules do.

A rank sends forward and receives a gradient from the same neighbour at once, as 1F1B does between a forward and a
backward pass, through Megatron's own communicator and the job's own groups: batched or not, as its flags say.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

from ..upstream.seams import Reliance

#: Elements of the small message, whose time is the latency.
SMALL = 1
#: Exchanges that are timed, of each size and pair: as many as take this long, and at least and at most so many.
_SECONDS, _LEAST, _MOST = 2.0, 5, 100
#: Exchanges before those that count: connections are made in the first.
_WARMUP = 3

NEIGHBOURS = tuple(
    Reliance(
        f"megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator.{name}",
        "called by sla-doctor --rates as Megatron's schedules call it",
        parameters,
    )
    for name, parameters in (
        ("send_forward_recv_backward", ("self", "output_tensors", "tensor_shapes", "is_last_stage")),
        ("send_backward_recv_forward", ("self", "input_tensor_grads", "tensor_shapes", "is_first_stage")),
    )
)


def exchange_seconds(config: Any, elements: int, with_ring: bool) -> dict[int, float]:
    """Median seconds of an exchange of ``elements`` each way, by the pipeline rank that sends forward; of this rank's
    own pairs, of which it is the one that sends forward.

    All ranks of the job call it, and pairs that have no rank in common exchange at once.

    Args:
        config: the model's ``TransformerConfig``; it says how ranks communicate, and in which type.
        elements: of one tensor.
        with_ring: whether the last rank sends forward to the first one too, as with virtual stages.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    group = parallel_state.get_pipeline_model_parallel_group()
    rank, size = group.rank(), group.size()
    config = copy.copy(config)
    # Shapes are known, and nobody listens.
    config.variable_seq_lengths, config.timers = False, None
    communicator = P2PCommunicator(group, config)
    found = {}
    hops = [*range(size - 1), *([size - 1] if with_ring and size > 2 else [])]
    for turn in _turns(hops, size):
        mine = [hop for hop in turn if rank in (hop, (hop + 1) % size)]
        seconds = _timed(communicator, mine[0] == rank if mine else None, elements)
        if mine and mine[0] == rank:
            found[rank] = seconds
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


def _timed(communicator: Any, sends_forward: bool | None, elements: int) -> float:
    """Median seconds of an exchange; ``sends_forward`` is ``None`` where this rank has no part in it."""
    import torch

    tensor = torch.zeros(elements, dtype=communicator.config.pipeline_dtype, device=torch.cuda.current_device())

    def exchange() -> float:
        start = time.perf_counter()
        if sends_forward:
            communicator.send_forward_recv_backward(tensor, tensor.shape, False)
        elif sends_forward is not None:
            communicator.send_backward_recv_forward(tensor, tensor.shape, False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    torch.distributed.barrier()
    first = statistics.median(exchange() for _ in range(_WARMUP))
    # All take as many.
    slowest = torch.tensor(first, device=torch.cuda.current_device())
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    count = min(_MOST, max(_LEAST, int(_SECONDS / max(float(slowest), 1e-6))))
    return statistics.median(exchange() for _ in range(count))
