"""The simulated step: closed forms, what must hold in any timeline, and the operations behind its pass times."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.commands.plan import timeline as module
from sla_megatron.commands.plan.compute import ModelWork, stage_operations
from sla_megatron.commands.plan.program import WAIT, Communication
from sla_megatron.commands.plan.timeline import Durations, Timeline, simulate
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.megatron_layout import hybrid_layout
from sla_megatron.pipeline.payload import MicrobatchShape
from sla_megatron.pipeline.schedule import Pass, Schedule

from ...strategies import schedules

BLOCKING, OVERLAPPED = Communication(), Communication(overlap=True)
COMMUNICATIONS = [BLOCKING, OVERLAPPED, Communication(overlap=True, overlap_warmup_flush=True)]

F, B = 1.0, 2.0


def equal_stages(schedule: Schedule, transfer: float = 0.0, forward: float = F, backward: float = B) -> Durations:
    """All stages, and all hops, are alike."""
    stages = schedule.pipeline_size * schedule.num_chunks
    return Durations((forward,) * stages, (backward,) * stages, (transfer,) * (stages - 1))


@st.composite
def runs(draw: st.DrawFn) -> tuple[Schedule, Durations, Communication]:
    """Any training schedule with any durations: binary fractions, which add up exactly."""
    schedule = replace(draw(schedules()), forward_only=False)
    stages = schedule.pipeline_size * schedule.num_chunks
    some = st.integers(0, 12).map(lambda number: number / 4)

    def several(count: int) -> tuple[float, ...]:
        return tuple(draw(st.lists(some, min_size=count, max_size=count)))

    durations = Durations(several(stages), several(stages), several(stages - 1))
    return schedule, durations, draw(st.sampled_from(COMMUNICATIONS))


# Closed forms


@pytest.mark.parametrize(("size", "count"), [(1, 1), (1, 5), (2, 4), (4, 4), (4, 16), (4, 2), (8, 13)])
def test_1f1b_without_communication(size: int, count: int) -> None:
    schedule = Schedule(size, 1, count)
    assert simulate(schedule, equal_stages(schedule)).step_time == (count + size - 1) * (F + B)


@pytest.mark.parametrize("communication", COMMUNICATIONS, ids=["blocking", "overlapped", "overlapped-flush"])
@pytest.mark.parametrize(
    ("size", "chunks", "count", "group"),
    [(2, 2, 4, None), (4, 2, 4, None), (4, 3, 16, None), (4, 2, 16, 6), (8, 4, 16, 8), (2, 3, 8, 4)],
)
def test_interleaved_without_communication(
    size: int, chunks: int, count: int, group: int | None, communication: Communication
) -> None:
    """The bubble is that of one virtual stage a rank, divided by ``v``."""
    schedule = Schedule(size, chunks, count, group)
    whole_rank = chunks * (F + B)
    expected = count * whole_rank + (size - 1) * whole_rank / chunks
    timeline = simulate(schedule, equal_stages(schedule), communication)
    assert timeline.step_time == expected
    assert timeline.busy == pytest.approx(count * whole_rank / expected)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_one_microbatch_goes_there_and_back(size: int) -> None:
    schedule = Schedule(size, 1, 1)
    expected = size * (F + B) + 2 * (size - 1) * 0.5
    assert simulate(schedule, equal_stages(schedule, 0.5)).step_time == expected


def test_1f1b_with_transfers_by_hand() -> None:
    """Two ranks, two microbatches, transfers of half a second; each exchange waits for both ranks."""
    schedule = Schedule(2, 1, 2)
    timeline = simulate(schedule, equal_stages(schedule, 0.5))
    # Rank 1 takes F0's output from 1 to 1.5, computes until 4.5, and only then takes F1's and gives the gradient; its
    # second gradient leaves at 8 and arrives at 8.5.
    assert timeline.starts == ((0.0, 1.5, 5.0, 8.5), (1.5, 2.5, 5.0, 6.0))
    assert timeline.ends == (10.5, 8.5)
    # On a line for both, F1's output and the first gradient go one after the other, until 5.5.
    halved = simulate(schedule, equal_stages(schedule, 0.5), half_duplex=True)
    assert halved.starts == ((0.0, 1.5, 5.5, 9.0), (1.5, 2.5, 5.5, 6.5))


# What must hold


@given(runs())
def test_every_pass_runs_once_after_what_it_needs(run: tuple[Schedule, Durations, Communication]) -> None:
    schedule, durations, communication = run
    timeline = simulate(schedule, durations, communication)
    spans = _spans(timeline)
    size, last = schedule.pipeline_size, schedule.pipeline_size * schedule.num_chunks - 1
    assert len(spans) == 2 * (last + 1) * schedule.num_microbatches
    for (stage, kind, microbatch), (start, end) in spans.items():
        assert end - start == durations.of(kind, stage)
        if kind == "F" and stage > 0:
            assert start >= spans[stage - 1, "F", microbatch][1] + durations.transfer[stage - 1]
        if kind == "B":
            assert start >= spans[stage, "F", microbatch][1]
        if kind == "B" and stage < last:
            assert start >= spans[stage + 1, "B", microbatch][1] + durations.transfer[stage]
    for rank in range(size):
        of_rank = [(start, end) for _, start, end in timeline.intervals(rank)]
        assert all(earlier[1] <= later[0] for earlier, later in pairwise(of_rank))
        assert timeline.ends[rank] >= of_rank[-1][1]


@given(runs())
def test_slower_is_not_faster_and_the_same_is_the_same(run: tuple[Schedule, Durations, Communication]) -> None:
    schedule, durations, communication = run
    first = simulate(schedule, durations, communication)
    assert simulate(schedule, durations, communication) == first
    slower_links = replace(durations, transfer=tuple(2 * seconds + 1 for seconds in durations.transfer))
    slower_gpus = replace(durations, backward=tuple(2 * seconds + 1 for seconds in durations.backward))
    assert simulate(schedule, slower_links, communication).step_time >= first.step_time
    assert simulate(schedule, slower_gpus, communication).step_time > first.step_time


def test_1f1b_never_overlaps() -> None:
    schedule = Schedule(4, 1, 8)
    steps = {simulate(schedule, equal_stages(schedule, 0.5), one).step_time for one in COMMUNICATIONS}
    assert len(steps) == 1


def test_overlap_hides_transfers_of_wide_groups() -> None:
    schedule = Schedule(4, 2, 16, 6)
    blocking, overlapped, flush = (
        simulate(schedule, equal_stages(schedule, 0.5), one).step_time for one in COMMUNICATIONS
    )
    assert flush <= overlapped < blocking


def test_durations_must_fit_the_schedule() -> None:
    with pytest.raises(ValueError, match="4 virtual stages, but durations of"):
        simulate(Schedule(4, 1, 4), equal_stages(Schedule(2, 1, 4)))


def test_ranks_that_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "operations", lambda pipeline, communication, rank: iter([(WAIT, rank)]))
    with pytest.raises(RuntimeError, match="pipeline ranks wait for each other"):
        simulate(Schedule(2, 1, 2), equal_stages(Schedule(2, 1, 2)))


def test_large_pipelines_take_seconds() -> None:
    """64 ranks, 65,536 passes: 512 GPUs with 8 tensor-parallel ranks, in a fraction of this on an idle machine."""
    schedule = Schedule(64, 2, 256)
    start = time.monotonic()
    timeline = simulate(schedule, equal_stages(schedule, 0.125), OVERLAPPED)
    assert time.monotonic() - start < 10
    assert timeline.step_time > 256 * 2 * (F + B)


def _spans(timeline: Timeline) -> dict[tuple[int, str, int], tuple[float, float]]:
    """(stage, kind, microbatch) -> start and end."""
    size = timeline.schedule.pipeline_size
    found = {}
    for rank in range(size):
        for one, start, end in timeline.intervals(rank):
            assert isinstance(one, Pass)
            found[one.chunk * size + rank, one.kind, one.microbatch] = start, end
    return found


# Operations

LAYERS, GROUPS = 4, 4
SHAPE = MicrobatchShape(sequence_length=64, microbatch_size=2, hidden_size=32)
WORK = ModelWork(num_heads=8, head_size=8, mlp_weights=(2 * 32 * 128,) * LAYERS, vocabulary=256)
LAYOUT = PipelineLayout.of_sizes(2, [2, 2])


def skipping(kv_projection: str = "full") -> SLAConfig:
    return SLAConfig(LAYERS, GROUPS, (3,), 3, kv_projection=kv_projection)


def test_dense_operations_by_hand() -> None:
    """Per token 2 operations a weight, per pair of positions that attend 4 a channel, half of the pairs."""
    (first, first_back), (last, last_back) = stage_operations(WORK, SHAPE, LAYOUT, skipping(), dense=True)
    weights = 32 * 64 + 2 * 32 * 32 + 64 * 32 + 2 * 32 * 128  # query, key and value, output, MLP
    layer = 2 * 128 * weights + 4 * 2 * (64 * 64 // 2) * 64
    assert (first, first_back) == (2 * layer, 4 * layer)
    assert last == 2 * layer + 2 * 128 * 32 * 256
    assert last_back == 2 * last


def test_full_works_as_the_dense_model_and_pruned_less() -> None:
    dense = stage_operations(WORK, SHAPE, LAYOUT, skipping(), dense=True)
    assert stage_operations(WORK, SHAPE, LAYOUT, skipping()) == dense
    pruned = stage_operations(WORK, SHAPE, LAYOUT, skipping("pruned"))
    # Layer 4, in stage 1, reads layer 1's K/V for three groups, and nobody reads its own.
    saved = 2 * 128 * 32 * 2 * 3 * 8
    assert pruned[0] == dense[0]
    assert pruned[1] == (dense[1][0] - saved, dense[1][1] - 2 * saved)


def test_operations_are_shared_by_the_gpus_of_a_stage() -> None:
    shared = replace(SHAPE, tensor_parallel_size=2, context_parallel_size=2)
    whole = stage_operations(WORK, SHAPE, LAYOUT, skipping())
    assert stage_operations(WORK, shared, LAYOUT, skipping()) == [(f / 4, b / 4) for f, b in whole]


@pytest.mark.parametrize(("recompute", "layers", "again"), [("full", None, 2), ("full", 1, 1), ("none", None, 0)])
def test_recomputed_layers(recompute: str, layers: int | None, again: int) -> None:
    """Whole layers, all of a stage or the first; the output layer is not run again."""
    work = replace(WORK, recompute=recompute, recomputed_layers=layers)
    plain, found = (stage_operations(one, SHAPE, LAYOUT, skipping()) for one in (WORK, work))
    layer = plain[0][0] / 2
    assert [b for _, b in found] == [b + again * layer for _, b in plain]


def test_operations_are_what_megatron_counts(megatron: None) -> None:
    """Its own throughput figure, of a dense model; of layers that predict further tokens it counts three norms each as
    well, and no others."""
    from megatron.training.training import num_floating_point_operations

    from sla_megatron.commands.convert.megatron_model import args_of

    words = "--num-layers 4 --hidden-size 32 --num-attention-heads 8 --group-query-attention --num-query-groups 4"
    words += " --kv-channels 8 --ffn-hidden-size 128 --seq-length 64 --max-position-embeddings 64 --vocab-size 256"
    words += " --tokenizer-type NullTokenizer --micro-batch-size 2"
    args = args_of(words.split(), torch.float32)
    args.padded_vocab_size = 256
    for further in (0, 1, 2):
        args.mtp_num_layers = further or None
        found = stage_operations(WORK, SHAPE, replace(LAYOUT, further_tokens=further), skipping())
        theirs = num_floating_point_operations(args, SHAPE.microbatch_size)
        assert sum(map(sum, found)) == theirs - further * 6 * 128 * 3 * 32


@pytest.mark.parametrize("pattern", ["*-*-*-*-", "M*-|G*E-", "*E*-"])
def test_operations_of_a_hybrid_are_what_megatron_counts(megatron: None, pattern: str) -> None:
    """Its own throughput figure: attention, MLPs, the experts that a token meets, Mamba, gated delta networks."""
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.training import num_floating_point_operations

    from sla_megatron.commands.convert.megatron_model import args_of
    from sla_megatron.commands.plan.settle import model_work

    words = "--hidden-size 64 --num-attention-heads 8 --group-query-attention --num-query-groups 4 --swiglu"
    words += " --kv-channels 8 --ffn-hidden-size 96 --seq-length 64 --max-position-embeddings 64 --vocab-size 256"
    words += " --tokenizer-type NullTokenizer --micro-batch-size 2 --mamba-head-dim 32 --linear-num-key-heads 4"
    if "E" in pattern:
        words += (
            " --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 80 --moe-shared-expert-intermediate-size 48"
        )
    args = args_of([*words.split(), f"--hybrid-layer-pattern={pattern.replace('|', '')}"], torch.float32)
    vars(args).update(padded_vocab_size=256, hybrid_layer_pattern=pattern)
    work = model_work(args, core_transformer_config_from_args(args))
    shape = MicrobatchShape(sequence_length=64, microbatch_size=2, hidden_size=64)
    sla = SLAConfig(pattern.count("*"), GROUPS, (1,), 3)
    layout = hybrid_layout(pattern, pattern.count("|") + 1)
    assert sum(map(sum, stage_operations(work, shape, layout, sla))) == num_floating_point_operations(args, 2)


def test_only_attention_layers_of_a_hybrid_are_pruned_and_recomputed_as_such() -> None:
    """Attention layer 4 is layer 5, in the second stage, after an MLP that has no projections to leave out."""
    layout = PipelineLayout.of_sizes(2, [3, 3])
    work = replace(WORK, kinds="***-*-", mlp_weights=(0, 0, 0, 4096, 0, 4096))
    dense = stage_operations(work, SHAPE, layout, skipping(), dense=True)
    pruned = stage_operations(work, SHAPE, layout, skipping("pruned"))
    attention = 2 * 128 * (32 * 64 + 2 * 32 * 32 + 64 * 32) + 4 * 2 * (64 * 64 // 2) * 64
    logits = 2 * 128 * 32 * 256
    assert [f for f, _ in dense] == [3 * attention, attention + 2 * 2 * 128 * 4096 + logits]
    assert [d - f for (d, _), (f, _) in zip(dense, pruned, strict=True)] == [0, 2 * 128 * 32 * 2 * 3 * 8]
    again = stage_operations(replace(work, recompute="attention"), SHAPE, layout, skipping(), dense=True)
    scores = 2 * 2 * 64**2 * 8 * 8
    assert [b - c for (_, b), (_, c) in zip(again, dense, strict=True)] == [3 * scores, scores]


def test_recomputed_attention() -> None:
    work = replace(WORK, recompute="attention")
    plain, found = (stage_operations(one, SHAPE, LAYOUT, skipping()) for one in (WORK, work))
    assert found[0][1] - plain[0][1] == 2 * 4 * 2 * (64 * 64 // 2) * 64


@pytest.mark.parametrize(("further_stage", "where"), [(None, 1), (0, 0)])
def test_layers_that_predict_further_tokens_by_hand(further_stage: int | None, where: int) -> None:
    """Two of them: dense layers with a matrix of 64 x 32 before, and their own logits; run again where layers are."""
    layout = replace(LAYOUT, further_tokens=2, further_stage=further_stage)
    work = replace(WORK, recompute="full")
    plain = stage_operations(work, SHAPE, LAYOUT, skipping("pruned"))
    found = stage_operations(work, SHAPE, layout, skipping("pruned"))
    dense = stage_operations(WORK, SHAPE, LAYOUT, skipping(), dense=True)[0][0] // 2
    layers, logits = 2 * (dense + 2 * 128 * 64 * 32), 2 * (2 * 128 * 32 * 256)
    more = [logits * stage + layers * (stage == where) for stage in range(2)]
    assert [f - g for (f, _), (g, _) in zip(found, plain, strict=True)] == more
    again = [layers * (stage == where) for stage in range(2)]
    assert [b - c for (_, b), (_, c) in zip(found, plain, strict=True)] == [
        2 * m + a for m, a in zip(more, again, strict=True)
    ]


def test_output_gate_is_as_wide_as_the_query() -> None:
    plain, gated = (stage_operations(one, SHAPE, LAYOUT, skipping()) for one in (WORK, replace(WORK, output_gate=True)))
    assert gated[0][0] - plain[0][0] == 2 * (2 * 128 * 32 * 64)
