"""One run of a pipeline schedule: a training step's forward and backward passes, or an evaluation step's forwards.

The schedule is upstream's; ``transport.py`` opens a step around it.  The transformer block of each virtual stage finds
the step through :func:`current_step`, gives it the payload that arrived and takes the one that leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby

from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from .joining import joined
from .packing import pack, unpack_and_empty
from .payload import MicrobatchShape
from .resident import ResidentTensors
from .routes import StageTraffic
from .waiting import Microbatch


class PipelineStep:
    """What one rank holds during one run of a schedule.

    Args:
        shape: the sizes of a microbatch.
        forward_only: whether no backward pass follows.
    """

    def __init__(self, shape: MicrobatchShape, forward_only: bool) -> None:
        self.shape = shape
        self.forward_only = forward_only
        self.resident = ResidentTensors()
        self._forwards: Counter[int] = Counter()

    def enter(
        self, traffic: StageTraffic, held: Microbatch, payload: Tensor | None, keeps_reads: bool
    ) -> Tensor | None:
        """Unpack what arrived at a stage and fetch what is resident, into ``held``.

        Args:
            traffic: what the stage does.
            held: the microbatch's tensors, which the stage's layers take.
            payload: ``[s, b, h + w]`` from the previous stage; ``None`` in stage 0.  The schedule keeps it: where more
                than hidden states arrived in it, it is emptied.
            keeps_reads: whether the stage holds on to all that it reads until its backward pass (full recomputation).

        Returns:
            the hidden states ``[s, b, h]`` that arrived; ``None`` in stage 0.
        """
        hidden_states = payload
        if traffic.arrives:
            copied = traffic.outlives[keeps_reads]
            hidden_states, arrived = unpack_and_empty(
                payload, traffic.arrives, copied, self.shape, traffic.tensor_parallel_rank
            )
            for tensor, whole in zip(traffic.arrives, arrived, strict=True):
                held.put(tensor.name, (whole,))
        # One layer reads those of the same readers at a time, so that their gradients come together.
        for _, alike in groupby(traffic.fetches, key=lambda tensor: (tensor.source, tensor.readers)):
            names = [tensor.name for tensor in alike]
            # A chunk runs its microbatches in ascending order, so that counting its passes numbers them.
            wholes = self.resident.fetch(names, self._forwards[traffic.stage], hidden_states)
            for name, whole in zip(names, wholes, strict=True):
                held.put(name, (whole,))
        return hidden_states

    def leave(self, traffic: StageTraffic, held: Microbatch, hidden_states: Tensor) -> Tensor:
        """Keep what becomes resident and pack what leaves; ``[s, b, h + w]``, or ``[s, b, h]`` where none leaves."""
        microbatch = self._forwards[traffic.stage]
        self._forwards[traffic.stage] += 1
        if traffic.keeps:
            names = [tensor.name for tensor in traffic.keeps]
            wholes = joined([held.take(name) for name in names])
            readers = [traffic.readers[name] for name in names]
            hidden_states = self.resident.keep(names, readers, microbatch, wholes, hidden_states)
        if traffic.leaves:
            pieces = [held.take(tensor.name) for tensor in traffic.leaves]
            return pack(hidden_states, pieces, traffic.leaves, self.shape, traffic.tensor_parallel_rank)
        # The schedule frees what it has sent, which must not be a view.
        return make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)


_current: ContextVar[PipelineStep | None] = ContextVar("sla_pipeline_step", default=None)


def current_step() -> PipelineStep:
    """The step that is running.  Raises ``RuntimeError`` outside of one."""
    step = _current.get()
    if step is None:
        raise RuntimeError(
            "a pipeline stage that carries tensors between layers ran outside of Megatron's schedules: call it through "
            "megatron.core.pipeline_parallel.get_forward_backward_func()"
        )
    return step


@contextmanager
def pipeline_step(step: PipelineStep) -> Iterator[None]:
    """Open ``step``; at the end everything resident must have been released."""
    token = _current.set(step)
    try:
        yield
        step.resident.require_released(step.forward_only)
    finally:
        _current.reset(token)
