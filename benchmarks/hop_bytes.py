"""Bytes of one hop: the lower bound, by its formula and nothing else, and the planner's figures.

The formula knows nothing of routes, payloads or schedules.  For a pipeline of ``P`` ranks, stages ``s_a`` of a source
layer and ``s_c`` of its reader, K/V cross the ``(s_c - s_a) mod P`` hops after ``s_a``; each (source layer, group) is
``2 q b d`` elements for sequence length ``q``, microbatch ``b``, head size ``d``; hidden states are ``q b hidden``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .pipeline_models import Shape, job_of


@dataclass(frozen=True)
class HopBytes:
    """Bytes that cross one hop forward with one microbatch; as many come back.

    Attributes:
        hop: the virtual stage that it leaves.
        source_rank, target_rank: the pipeline ranks.
        hidden: hidden states: what a dense model sends.
        kv_bound: the lower bound of K/V, by the formula.
        kv_planned: the planner's K/V.
        relay: hidden states and K/V if all travelled every hop from their layer to its reader, by the planner.
        padded: if every hop were as wide as the widest, by the planner.
    """

    hop: int
    source_rank: int
    target_rank: int
    hidden: int
    kv_bound: int
    kv_planned: int
    relay: int
    padded: int

    @property
    def sizes(self) -> dict[str, int]:
        """The payload of each way, in bytes."""
        return {"dense": self.hidden, "sla": self.hidden + self.kv_bound, "relay": self.relay, "padded": self.padded}

    def as_row(self) -> dict[str, Any]:
        """For the result."""
        return {f"{name}_bytes" if name not in _PLACE else name: value for name, value in asdict(self).items()}


_PLACE = ("hop", "source_rank", "target_rank")


def lower_bound(shape: Shape, element_bytes: int) -> list[tuple[int, int]]:
    """For each hop the bytes of hidden states and of K/V that must cross it."""
    per_stage = shape.layers // shape.stages
    skipping = round(0.75 * shape.heads)
    kv = [0] * (shape.stages - 1)
    for source in range(shape.layers - shape.distance):
        s_a, s_c = source // per_stage, (source + shape.distance) // per_stage
        for hop in range(s_a, s_a + (s_c - s_a) % shape.ranks):
            kv[hop] += skipping * 2 * shape.seq_length * (shape.hidden // shape.heads) * element_bytes
    return [(shape.seq_length * shape.hidden * element_bytes, each) for each in kv]


def hop_bytes(shape: Shape, element_bytes: int) -> list[HopBytes]:
    """Every hop's, in order."""
    from sla_megatron.commands.plan.traffic import hop_traffic, relayed_elements

    job = job_of(shape, element_bytes)
    hops = hop_traffic(job)
    widest = max(hop.payload_bytes for hop in hops)
    return [
        HopBytes(
            hop.hop,
            hop.source_rank,
            hop.target_rank,
            hidden,
            kv,
            hop.kv_bytes,
            hop.hidden_bytes + relayed_elements(job, hop.hop) * job.element_bytes,
            widest,
        )
        for hop, (hidden, kv) in zip(hops, lower_bound(shape, element_bytes), strict=True)
    ]
