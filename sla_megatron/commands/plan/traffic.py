"""Bytes that cross each hop and wait on each rank.  Pure Python.

Every figure comes from the declared tensors, the route plan and the microbatch shape that the transport itself
allocates by.  It is that of one GPU and one microbatch, of the tensor-parallel rank that has most of it: ranks may hold
different numbers of a layer's skip groups.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...attention.declared import shared_groups
from ...attention.roles import SharedTensor
from ...pipeline.payload import Columns
from ...pipeline.residency import residency
from .job import Job


@dataclass(frozen=True)
class HopTraffic:
    """What crosses one hop in the forward pass of one microbatch; as much comes back in the backward pass.

    Attributes:
        hop: number of the virtual stage that it leaves.
        source_rank: the pipeline rank that sends.
        target_rank: the pipeline rank that receives.
        hidden_bytes: hidden states, all that crosses without skip-layer attention.
        kv_bytes: keys and values.
        shared: whose: who shares them with whom, among the attention layers, and which groups.  Where keys and values
            cross together, the keys stand for both.
    """

    hop: int
    source_rank: int
    target_rank: int
    hidden_bytes: int
    kv_bytes: int
    shared: tuple[tuple[SharedTensor, tuple[int, ...]], ...]

    @property
    def payload_bytes(self) -> int:
        """All that crosses."""
        return self.hidden_bytes + self.kv_bytes

    @property
    def ratio(self) -> float:
        """Payload over the dense model's."""
        return self.payload_bytes / self.hidden_bytes


@dataclass(frozen=True)
class RankMemory:
    """What one pipeline rank holds between two passes of a training step, at most.

    Attributes:
        rank: the pipeline rank.
        resident_bytes: K/V that wait for a later stage of the rank, and gradients that wait for an earlier one.
        arrival_buffers: payloads that have been received before their pass.
        arriving_kv_bytes: K/V in these payloads.
        arriving_hidden_bytes: hidden states in these payloads, there without skip-layer attention as well.
    """

    rank: int
    resident_bytes: int
    arrival_buffers: int
    arriving_kv_bytes: int
    arriving_hidden_bytes: int


@dataclass(frozen=True)
class Totals:
    """Forward and backward bytes over all hops of a pipeline, for one microbatch.

    Attributes:
        dense: hidden states alone.
        payload: hidden states and K/V as they travel.
        relayed: as if no K/V were resident and all travelled every hop from their layer to its reader.
        padded: as if every hop were as wide as the widest.
    """

    dense: int
    payload: int
    relayed: int
    padded: int

    @property
    def kv(self) -> int:
        """Bytes of K/V in ``payload``."""
        return self.payload - self.dense


def hop_traffic(job: Job) -> tuple[HopTraffic, ...]:
    """Every hop's traffic, in order."""
    plan, layout, shape = job.plan, job.layout, job.shape
    groups, stands_for_both = shared_groups(job.sla), job.sla.shared_kinds[0]
    one_state = shape.hidden_elements * job.element_bytes
    hops = []
    for hop in range(layout.num_stages - 1):
        most = max(shape.elements(plan.hop_columns(hop, rank)) for rank in job.tensor_ranks)
        crossing = {route.tensor.name for route in plan.hop(hop)}
        hops.append(
            HopTraffic(
                hop,
                layout.rank(hop),
                layout.rank(hop + 1),
                one_state * layout.hidden_states(hop),
                most * job.element_bytes,
                tuple(each for each in groups.items() if each[0] in crossing and each[0].kind == stands_for_both),
            )
        )
    return tuple(hops)


def rank_memory(job: Job) -> tuple[RankMemory, ...]:
    """What every pipeline rank holds at the peak of its schedule.  Raises :class:`PlanError` without a schedule."""
    layout, one_state = job.layout, job.shape.hidden_elements * job.element_bytes
    found = []
    for rank in range(layout.pipeline_size):
        # Where the layers that predict further tokens are on another rank than the last, payloads differ: the largest.
        arriving = range((rank - 1) % layout.pipeline_size, layout.num_stages - 1, layout.pipeline_size)
        hidden = one_state * max(map(layout.hidden_states, arriving), default=1)
        early = job.communication.overlap_warmup_flush
        held = [
            residency(job.plan, job.schedule, job.shape, rank, tensor_rank, early) for tensor_rank in job.tensor_ranks
        ]
        buffers = held[0].arrival_buffers
        found.append(
            RankMemory(
                rank,
                max(one.resident for one in held) * job.element_bytes,
                buffers,
                max(one.arriving for one in held) * job.element_bytes,
                buffers * hidden,
            )
        )
    return tuple(found)


def totals(job: Job) -> Totals:
    """The sums over all hops, and those of two simpler ways to move K/V."""
    hops = hop_traffic(job)
    dense = 2 * sum(hop.hidden_bytes for hop in hops)
    widest = max((hop.payload_bytes for hop in hops), default=0)
    return Totals(
        dense,
        2 * sum(hop.payload_bytes for hop in hops),
        dense + 2 * sum(relayed_elements(job, hop.hop) for hop in hops) * job.element_bytes,
        2 * widest * len(hops),
    )


def relayed_elements(job: Job, hop: int) -> int:
    """Elements beside hidden states that would cross ``hop`` if none were resident and all travelled every hop to their
    last reader."""
    passing = [route.tensor for route in job.plan.routes if route.source_stage <= hop < route.reader_stages[-1]]
    return max(job.shape.elements(Columns.of(passing, rank)) for rank in job.tensor_ranks)
