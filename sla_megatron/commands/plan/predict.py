"""The predicted step: skip-layer attention against the dense model, at given rates.  Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from .compute import stage_operations
from .job import Job
from .timeline import Durations, Timeline, simulate
from .traffic import hop_traffic


@dataclass(frozen=True)
class Rates:
    """What the machine does.

    Attributes:
        link_bytes: bytes a second between neighbouring pipeline ranks, in one direction, of one GPU.
        operations: floating-point operations a second that one GPU achieves.
        link_latency: seconds that a transfer takes beside its bytes.
        half_duplex: whether a link carries one direction at a time.
    """

    link_bytes: float
    operations: float
    link_latency: float = 0.0
    half_duplex: bool = False


@dataclass(frozen=True)
class Prediction:
    """One step with skip-layer attention, and one of the dense model in the same layout."""

    sla: Timeline
    dense: Timeline

    @property
    def overhead(self) -> float:
        """How much longer the step is than the dense one, as a share of it; negative where it is shorter."""
        return self.sla.step_time / self.dense.step_time - 1


def durations(job: Job, rates: Rates, dense: bool = False) -> Durations:
    """How long passes and transfers of ``job`` take; ``dense``: those of the model without skip-layer attention."""
    operations = stage_operations(job.work, job.shape, job.layout, job.sla, dense)
    sizes = [hop.hidden_bytes if dense else hop.payload_bytes for hop in hop_traffic(job)]
    return Durations(
        tuple(forward / rates.operations for forward, _ in operations),
        tuple(backward / rates.operations for _, backward in operations),
        tuple(rates.link_latency + size / rates.link_bytes for size in sizes),
    )


def predict(job: Job, rates: Rates) -> Prediction:
    """Simulate both.  Raises :class:`PlanError` where the schedule does not run."""
    sla, dense = (
        simulate(job.schedule, durations(job, rates, dense), job.communication, rates.half_duplex)
        for dense in (False, True)
    )
    return Prediction(sla, dense)
