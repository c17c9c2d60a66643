"""What a rank holds, against a replay that keeps every resident key and value, and its gradient, in a set."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.residency import Residency
from sla_megatron.pipeline.schedule import Schedule

from ..strategies import KV, SLAPlan, route_plans, schedules


@st.composite
def runs(draw: st.DrawFn) -> tuple[SLAPlan, Schedule]:
    """A route plan and a schedule for its pipeline."""
    plan = draw(route_plans())
    return plan, draw(schedules(plan.layout.pipeline_size, plan.layout.num_chunks))


def stages_of(plan: SLAPlan, groups: range) -> dict[tuple[KV, int], int]:
    """The spec's formula: K/V of ``groups`` and the stage that keeps it -> that rank's last stage that reads it."""
    sla, size = plan.sla, plan.layout.pipeline_size
    stage = {layer: s for s, layers in enumerate(plan.layout.stages) for layer in layers}
    found: dict[tuple[KV, int], int] = {}
    for layer in range(1, sla.num_layers + 1):
        for kind, group in ((kind, group) for kind in ("key", "value") for group in groups):
            source = sla.source_of(layer, group, kind)
            arrival = stage[source] + (stage[layer] - stage[source]) % size
            if arrival < stage[layer]:
                kept = ((kind, source, group), arrival)
                found[kept] = max(found.get(kept, 0), stage[layer])
    return found


def replay(plan: SLAPlan, schedule: Schedule, rank: int, tensor_parallel_rank: int) -> int:
    """The most keys, values and gradients of them that ``rank`` holds after a pass; in the end it must hold none.

    A gradient is there from the first backward pass of a stage that read it, which is the last stage's.
    """
    resident = stages_of(plan, plan.sla.rank_groups(plan.tensor_parallel_size, tensor_parallel_rank))
    held: set[tuple[str, KV, int]] = set()
    most = 0
    for kind, chunk, microbatch in schedule.passes(rank):
        stage = chunk * schedule.pipeline_size + rank
        for (kv, keeps), fetches in resident.items():
            what = ("K/V" if kind == "F" else "gradient", kv, microbatch)
            taken, given_ = (fetches, keeps) if kind == "F" else (keeps, fetches)
            if stage == taken:
                held.remove(what)
            if stage == given_:
                assert what not in held
                held.add(what)
        most = max(most, len(held))
    assert not held
    return most


@given(runs())
@settings(max_examples=200)
def test_resident_tensors(run: tuple[SLAPlan, Schedule]) -> None:
    """The peak is the replay's on every rank, in training and evaluation, and after the last pass nothing is left."""
    plan, schedule = run
    for rank in range(schedule.pipeline_size):
        for tensor_parallel_rank in range(plan.tensor_parallel_size):
            found = plan.residency(schedule, rank, tensor_parallel_rank)
            assert found.resident == replay(plan, schedule, rank, tensor_parallel_rank)
            assert found.total == found.resident + found.arriving


def waiting_payloads(schedule: Schedule, rank: int, kind: str) -> list[list[int]]:
    """After each pass of ``kind``: the stages for which a payload has been received and not yet used.

    A rank asks for the payload of its next pass.  The one at the end of the ring where that kind begins asks, in its
    i-th pass, for what the other end sent after its pass i - (P - 1).
    """
    size, last = schedule.pipeline_size, schedule.pipeline_size * schedule.num_chunks - 1
    begins, no_receiver, no_sender, step = (0, 0, last, 1) if kind == "F" else (size - 1, last, 0, -1)

    def stages(of_rank: int) -> list[int]:
        return [chunk * size + of_rank for k, chunk, _ in schedule.passes(of_rank) if k == kind]

    if rank != begins:
        return [[stage] for stage in stages(rank)]
    sent_after = [None if stage == no_sender else stage + step for stage in stages((rank - step) % size)]
    moments, received, used = [], [], 0
    for i, stage in enumerate(stages(rank)):
        used += stage != no_receiver
        if i >= size - 1 and sent_after[i - (size - 1)] is not None:
            received.append(sent_after[i - (size - 1)])
        moments.append(received[used:])
    return moments


@given(runs())
def test_arriving_tensors(run: tuple[SLAPlan, Schedule]) -> None:
    """The bound on keys and values in payloads that wait holds, and is no more than as many of the widest payload."""
    plan, schedule = run
    hops = range(plan.layout.num_stages - 1)
    for rank in range(schedule.pipeline_size):
        forward = waiting_payloads(schedule, rank, "F")
        backward = waiting_payloads(schedule, rank, "B")
        for tensor_parallel_rank in range(plan.tensor_parallel_size):
            widths = [plan.hop_width(hop, tensor_parallel_rank) for hop in hops] + [0]
            # The hop before a stage going forward, and after it coming back; neither end of the pipeline has one.
            into = max((sum(widths[s - 1] if s else 0 for s in stages) for stages in forward), default=0)
            back = max((sum(widths[s] for s in stages) for stages in backward), default=0)
            found = plan.residency(schedule, rank, tensor_parallel_rank)
            assert into + back <= found.arriving <= found.arrival_buffers * max(widths)
            counts = [max(map(len, moments), default=0) for moments in (forward, backward)]
            assert found.arrival_buffers == sum(counts)


@given(route_plans(), st.data())
def test_without_interleaving_nothing_is_resident(plan: SLAPlan, data: st.DataObject) -> None:
    """One stage a rank: K/V wait in payloads only, at most one each way, and none at the pipeline's ends."""
    layout = PipelineLayout(plan.layout.num_stages, plan.layout.stages)
    plan = SLAPlan(plan.sla, layout, plan.tensor_parallel_size)
    schedule = data.draw(schedules(layout.num_stages, 1), label="schedule")
    for rank in range(layout.num_stages):
        found = plan.residency(schedule, rank)
        backward = rank < layout.num_stages - 1 and not schedule.forward_only
        assert (found.resident, found.arrival_buffers) == (0, (rank > 0) + backward)
        assert found.arriving == plan.hop_width(rank - 1) + (plan.hop_width(rank) if backward else 0)


def test_by_hand() -> None:
    """Stages 1 | 2 | 3 | 4 on 2 ranks, distance 2, 3 groups: each rank keeps a layer's K/V for its other stage."""
    plan = SLAPlan(SLAConfig(4, 3, (2,), 3), PipelineLayout.of_sizes(2, [1, 1, 1, 1]))
    # Both microbatches' K/V wait for the second chunk, and then both gradients for the first.
    assert [plan.residency(Schedule(2, 2, 2), rank) for rank in (0, 1)] == [Residency(12, 2, 0)] * 2
    assert [plan.residency(Schedule(2, 2, 2, forward_only=True), rank) for rank in (0, 1)] == [Residency(12, 1, 0)] * 2
    # In groups of 4, that many wait; between two such groups, gradients of one and K/V of the next.
    assert plan.residency(Schedule(2, 2, 4, 4, forward_only=True), 0) == Residency(24, 3, 0)
    assert plan.residency(Schedule(2, 2, 4, 4), 1) == Residency(24, 4, 0)


def test_arriving_by_hand() -> None:
    """4 groups of distance 1 in stages 1 | 2 | 3 | 4: hops carry their K/V; of 4 microbatches in a row 3 wait."""
    plan = SLAPlan(SLAConfig(4, 4, (1,), 4), PipelineLayout.of_sizes(2, [1, 1, 1, 1]))
    assert [plan.hop_width(hop) for hop in range(3)] == [8, 8, 8]
    # Rank 0 is ahead going forward and rank 1 going back; the other way, each has only its next payload.
    assert [plan.residency(Schedule(2, 2, 4, 4), rank) for rank in (0, 1)] == [Residency(0, 3 + 1, 24 + 8)] * 2
    evaluation = Schedule(2, 2, 4, 4, forward_only=True)
    assert [plan.residency(evaluation, rank) for rank in (0, 1)] == [Residency(0, 3, 24), Residency(0, 1, 8)]
