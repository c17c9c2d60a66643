"""One run of a pipeline schedule: a training step's forward and backward passes, or an evaluation step's forwards.

The schedule is upstream's; ``transport.py`` opens a step around it.  The transformer block of each virtual stage finds
the step through :func:`current_step`, gives it the payload that arrived and takes the one that leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from ..attention.microbatch_kv import Bundle, MicrobatchKV
from .packing import pack, unpack_and_empty
from .payload import MicrobatchShape
from .resident_kv import ResidentKV
from .routes import StageTraffic


class PipelineStep:
    """What one rank holds during one run of a schedule.

    Args:
        shape: the sizes of a microbatch.
        forward_only: whether no backward pass follows.
    """

    def __init__(self, shape: MicrobatchShape, forward_only: bool) -> None:
        self.shape = shape
        self.forward_only = forward_only
        self.resident = ResidentKV()
        self._forwards: Counter[int] = Counter()

    def enter(
        self, traffic: StageTraffic, kv: MicrobatchKV, payload: Tensor | None, keeps_reads: bool
    ) -> Tensor | None:
        """Unpack what arrived at a stage and fetch what is resident, into ``kv``.

        Args:
            traffic: what the stage does.
            kv: the microbatch's K/V, which the stage's layers take from.
            payload: ``[s, b, h + w]`` from the previous stage; ``None`` in stage 0.  The schedule keeps it: where K/V
                arrived in it, it is emptied.
            keeps_reads: whether the stage holds on to K/V that it reads until its backward pass (full recomputation).

        Returns:
            the hidden states ``[s, b, h]`` that arrived; ``None`` in stage 0.
        """
        hidden_states = payload
        if traffic.arrives:
            sizes = {name: traffic.num_groups[name] for name in traffic.arrives}
            outlives = [name for name in sizes if name in traffic.keeps or (keeps_reads and name not in traffic.leaves)]
            hidden_states, arrived = unpack_and_empty(payload, sizes, outlives, self.shape)
            for name, bundle in arrived.items():
                kv.put(name, _in_one_piece(bundle))
        for name in traffic.fetches:
            # A chunk runs its microbatches in ascending order, so that counting its passes numbers them.
            kv.put(name, _in_one_piece(self.resident.fetch(name, self._forwards[traffic.stage], hidden_states)))
        return hidden_states

    def leave(self, traffic: StageTraffic, kv: MicrobatchKV, hidden_states: Tensor) -> Tensor:
        """Keep what becomes resident and pack what leaves; ``[s, b, h + w]``, or ``[s, b, h]`` where none leaves."""
        microbatch = self._forwards[traffic.stage]
        self._forwards[traffic.stage] += 1
        for name in traffic.keeps:
            hidden_states = self.resident.keep(name, microbatch, kv.take(name).joined(), hidden_states)
        if traffic.leaves:
            return pack(hidden_states, [kv.take(name) for name in traffic.leaves], self.shape)
        # The schedule frees what it has sent, which must not be a view.
        return make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)


def _in_one_piece(bundle: Sequence[Tensor]) -> Bundle:
    return Bundle(*([tensor] for tensor in bundle))


_current: ContextVar[PipelineStep | None] = ContextVar("sla_pipeline_step", default=None)


def current_step() -> PipelineStep:
    """The step that is running.  Raises ``RuntimeError`` outside of one."""
    step = _current.get()
    if step is None:
        raise RuntimeError(
            "a pipeline stage with skip-layer K/V ran outside of Megatron's schedules: call it through "
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
