"""What skip-layer attention costs beside the dense model: parameters, operations, cache, wire.  Pure Python."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...attention.sla_config import SLAConfig
from .compute import stage_operations
from .job import Job
from .traffic import totals


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        parameters: of the whole model; ``None`` where they are not counted.
        operations: floating-point operations of a forward pass, for one token of a full sequence.
        cache_bytes: K/V that generation keeps, for one token and over all layers: each live tensor of a (layer, group)
            once.
        wire_bytes: what crosses all hops of a pipeline, forward and backward, of one GPU and one microbatch.
    """

    parameters: int | None
    operations: int
    cache_bytes: int
    wire_bytes: int


@dataclass(frozen=True)
class Costs:
    """The dense model, and skip-layer attention with dead projections kept and left out."""

    dense: Cost
    full: Cost
    pruned: Cost


def costs(job: Job) -> Costs:
    """Of ``job``'s model in its layout, whichever of ``full`` and ``pruned`` it has."""
    sums, known = totals(job), job.parameters
    dense, pruned = (None, None) if known is None else known
    full_sla, pruned_sla = (replace(job.sla, kv_projection=projection) for projection in ("full", "pruned"))
    live = sum(map(job.sla.num_live, range(1, job.sla.num_layers + 1)))
    cache = live * job.work.head_size * job.element_bytes
    whole = 2 * job.sla.num_layers * job.sla.num_query_groups * job.work.head_size * job.element_bytes
    return Costs(
        Cost(dense, _operations(job, full_sla, dense=True), whole, sums.dense),
        Cost(dense, _operations(job, full_sla), cache, sums.payload),
        Cost(pruned, _operations(job, pruned_sla), cache, sums.payload),
    )


def _operations(job: Job, sla: SLAConfig, dense: bool = False) -> int:
    shape = job.shape
    stages = stage_operations(job.work, shape, job.layout, sla, dense)
    on_all_gpus = sum(forward for forward, _ in stages) * shape.tensor_parallel_size * shape.context_parallel_size
    return round(on_all_gpus / (shape.sequence_length * shape.microbatch_size))
