"""What a rank holds for other stages while a schedule runs.  Pure Python.

Between two passes a rank holds, of each microbatch, the resident tensors that not all of their readers have fetched,
and the gradients that readers have left for them and that the stage which kept them has not collected.  Beside these
there are payloads that were received and not yet unpacked.
"""

from __future__ import annotations

from dataclasses import dataclass

from .payload import Columns, MicrobatchShape
from .routes import RoutePlan
from .schedule import Schedule


@dataclass(frozen=True)
class Residency:
    """The most that one rank holds between two passes, in elements.

    Attributes:
        resident: most elements of resident tensors and deposited gradients at one moment.
        arrival_buffers: most payloads that have been received before their pass, in either direction.
        arriving: most elements in those payloads at one moment, hidden states not counted; at most ``arrival_buffers``
            times the widest hop.
    """

    resident: int
    arrival_buffers: int
    arriving: int

    @property
    def total(self) -> int:
        """A bound on the elements that are alive between two passes."""
        return self.resident + self.arriving


def residency(
    plan: RoutePlan,
    schedule: Schedule,
    shape: MicrobatchShape,
    rank: int,
    tensor_parallel_rank: int = 0,
    early_receives: bool = False,
) -> Residency:
    """Run ``schedule`` on pipeline ``rank`` and note the most that it holds of microbatches of ``shape``.

    ``early_receives``: with ``--overlap-p2p-communication-warmup-flush``, which receives one payload further ahead.
    """
    layout = plan.layout
    kept = {stage: 0 for stage in range(layout.num_stages)}
    released = dict(kept)
    for route in plan.routes:
        size = shape.elements(Columns.of([route.tensor], tensor_parallel_rank))
        for stage, readers in route.resident.items():
            kept[stage] += size
            # The last that fetches it is the first that leaves a gradient for it.
            released[readers[-1]] += size
    now = peak = 0
    for kind, chunk, _ in schedule.passes(rank):
        stage = layout.stage(rank, chunk)
        # Forward: what is fetched for the last time goes, what is kept comes.  Backward: the same of gradients, in
        # reverse.
        gone, come = (released, kept) if kind == "F" else (kept, released)
        now += come[stage] - gone[stage]
        peak = max(peak, now)
    forward = _arrivals(schedule, rank == 0, early_receives)
    backward = _arrivals(schedule, rank == layout.pipeline_size - 1, early_receives)
    if schedule.forward_only:
        backward = 0
    stages = [layout.stage(rank, chunk) for chunk in range(layout.num_chunks)]
    widest_in = max(shape.elements(plan.hop_columns(stage - 1, tensor_parallel_rank)) for stage in stages)
    widest_back = max(shape.elements(plan.hop_columns(stage, tensor_parallel_rank)) for stage in stages)
    return Residency(peak, forward + backward, forward * widest_in + backward * widest_back)


def _arrivals(schedule: Schedule, is_leading: bool, early_receives: bool) -> int:
    """Payloads of one direction that wait: upstream's ``fwd_recv_buffer_size``; the leading rank may be far behind."""
    if schedule.num_chunks == 1:
        return 0 if is_leading else 1
    if is_leading:
        return schedule.group_size - schedule.pipeline_size + 1
    return 2 if early_receives else 1
