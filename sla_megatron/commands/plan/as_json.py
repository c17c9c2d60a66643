"""The plan as JSON: bytes and counts are integers, times are seconds.  Pure Python."""

from __future__ import annotations

import json
from typing import Any

from ...attention.sla_config import KINDS, SLAConfig
from .figures import Figures
from .job import Job
from .predict import Prediction
from .suggest import Layout
from .timeline import Timeline
from .traffic import HopTraffic, Totals


def as_json(figures: Figures) -> str:
    """The same figures as ``report.report``, exact."""
    found = {
        "run": _run(figures.job),
        "sla": _sla(figures.job.sla),
        "costs": {name: vars(cost) for name, cost in vars(figures.costs).items()},
        "hops": [_hop(hop, figures.job) for hop in figures.hops],
        "ranks": [vars(rank) for rank in figures.ranks],
        "totals": _totals(figures.job, figures.totals),
        "virtual_stages": [vars(one) | {"local_to_rank": one.kv_bytes == 0} for one in figures.stages],
        "rates": None if figures.rates is None else vars(figures.rates),
        "prediction": None if figures.prediction is None else _prediction(figures.prediction),
        "suggestions": [_layout(one) for one in figures.layouts],
    }
    return json.dumps(found, indent=2)


def _run(job: Job) -> dict[str, Any]:
    shape, layout = job.shape, job.layout
    return {
        "description": job.description,
        "num_layers": layout.num_layers,
        "hybrid_layer_pattern": job.pattern or None,
        "attention_layers": list(job.work.numbers.attention),
        "num_gpus": job.num_gpus,
        "tensor_parallel_size": shape.tensor_parallel_size,
        "context_parallel_size": shape.context_parallel_size,
        "pipeline_parallel_size": layout.pipeline_size,
        "data_parallel_size": job.data_parallel_size,
        "virtual_stages": layout.num_chunks,
        "layers_of_stage": [list(layers) for layers in layout.stages],
        "num_microbatches": job.schedule.num_microbatches,
        "element_bytes": job.element_bytes,
        "tensor_parallel_ranks_differ": len(job.tensor_ranks) > 1,
    }


def _sla(sla: SLAConfig) -> dict[str, Any]:
    """What skips; layers are counted as ``--sla-layers`` counts them."""
    return {
        "share": sla.share,
        "skip_distances": list(sla.skip_distances),
        "source_layers": list(sla.source_layers),
        "skip_groups": list(sla.skip_groups),
        "layers": list(sla.consumer_layers),
        "kv_projection": sla.kv_projection,
        "dead": {kind: sla.num_dead(kind) for kind in KINDS},
    }


def _hop(hop: HopTraffic, job: Job) -> dict[str, Any]:
    """Layers are counted as ``--sla-layers`` counts them, and once more in the stack of all layers."""
    numbers = job.work.numbers
    return {
        "hop": hop.hop,
        "source_rank": hop.source_rank,
        "target_rank": hop.target_rank,
        "hidden_bytes": hop.hidden_bytes,
        "kv_bytes": hop.kv_bytes,
        "payload_bytes": hop.payload_bytes,
        "kv": [
            {
                "layer": shared.source,
                "reader": reader,
                "groups": list(groups),
                "tensors": list(job.sla.shared_kinds),
                "stack_layer": numbers.in_stack(shared.source),
                "stack_reader": numbers.in_stack(reader),
            }
            for shared, groups in hop.shared
            for reader in shared.readers
        ],
    }


def _totals(job: Job, totals: Totals) -> dict[str, dict[str, int]]:
    """Each total for a microbatch and for a step."""
    per_microbatch = {
        "dense_bytes": totals.dense,
        "payload_bytes": totals.payload,
        "kv_bytes": totals.kv,
        "relayed_bytes": totals.relayed,
        "padded_bytes": totals.padded,
    }
    count = job.schedule.num_microbatches
    return {"microbatch": per_microbatch, "step": {name: size * count for name, size in per_microbatch.items()}}


def _prediction(prediction: Prediction) -> dict[str, Any]:
    return {
        "overhead": prediction.overhead,
        "sla": _timeline(prediction.sla),
        "dense": _timeline(prediction.dense),
    }


def _timeline(timeline: Timeline) -> dict[str, Any]:
    durations = timeline.durations
    return {
        "step_seconds": timeline.step_time,
        "computing": timeline.busy,
        "forward_seconds": list(durations.forward),
        "backward_seconds": list(durations.backward),
        "transfer_seconds": list(durations.transfer),
    }


def _layout(one: Layout) -> dict[str, Any]:
    layout = one.job.layout
    return {
        "pipeline_parallel_size": layout.pipeline_size,
        "virtual_stages": layout.num_chunks,
        "data_parallel_size": one.job.data_parallel_size,
        "num_microbatches": one.job.schedule.num_microbatches,
        "kv_bytes": one.totals.kv,
        "payload_bytes": one.totals.payload,
        "resident_bytes": one.resident_bytes,
        "step_seconds": None if one.prediction is None else one.prediction.sla.step_time,
        "overhead": None if one.prediction is None else one.prediction.overhead,
        "is_given": one.is_given,
        "hybrid_layer_pattern": one.job.pattern or None,
    }
