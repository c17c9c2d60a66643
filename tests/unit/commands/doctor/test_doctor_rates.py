"""``sla-doctor --rates``: its flags give ``sla-plan`` back what was measured; who exchanges with whom, and when."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from dataclasses import replace
from itertools import pairwise

import pytest

from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.commands.doctor.rates import Measured, plan_flags, summary
from sla_megatron.commands.plan.compute import ModelWork, stage_operations
from sla_megatron.commands.plan.flags import add_plan_args, check_plan_args, rates
from sla_megatron.commands.plan.job import Job
from sla_megatron.commands.plan.predict import durations, predict
from sla_megatron.commands.plan.traffic import hop_traffic
from sla_megatron.pipeline.exchange import Seconds, _turns
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.pass_timers import PassTimers
from sla_megatron.pipeline.payload import MicrobatchShape

#: Three layers on each of two ranks; the last has the output layer as well.
JOB = Job(
    sla=SLAConfig(6, 4, (4,), 3),
    layout=PipelineLayout.of_sizes(2, (3, 3)),
    shape=MicrobatchShape(64, 2, 32),
    work=ModelWork(num_heads=4, head_size=8, mlp_weights=(8192,) * 6, vocabulary=256),
    element_bytes=2,
    num_gpus=2,
    global_batch_size=16,
)
PAYLOAD = hop_traffic(JOB)[0].payload_bytes


def measured(one_way: float, both_ways: float, word: float = 1e-5, job: Job = JOB) -> Measured:
    """On ranks that do a thousand million operations a second."""
    work = stage_operations(JOB.work, JOB.shape, JOB.layout, JOB.sla)
    passes = [[(stage, forward / 1e9, backward / 1e9)] for stage, (forward, backward) in enumerate(work)]
    return Measured(job, 256, PAYLOAD, {0: (Seconds(word, word), Seconds(one_way, both_ways))}, passes)


@pytest.mark.parametrize(
    ("one_way", "both_ways", "word", "transfer"),
    [
        pytest.param(0.002, 0.0021, 1e-5, 0.0021, id="full-duplex"),
        pytest.param(0.002, 0.0039, 1e-5, 0.002, id="half-duplex"),
        # Of so few bytes that they are lost in the noise.
        pytest.param(0.002, 0.002, 0.003, 0.002, id="latency"),
    ],
)
def test_the_plan_has_the_times_that_were_measured(
    one_way: float, both_ways: float, word: float, transfer: float
) -> None:
    """Passes and the payload's transfer, to the digits that are printed."""
    found = measured(one_way, both_ways, word)
    asked = add_plan_args(ArgumentParser()).parse_args(plan_flags(found).split())
    check_plan_args(asked)
    its = durations(JOB, rates(asked))
    assert its.transfer == pytest.approx([transfer], rel=1e-3)
    for stage, (forward, backward) in enumerate(pair for _, *pair in (one for (one,) in found.passes)):
        assert (its.forward[stage], its.backward[stage]) == pytest.approx((forward, backward), rel=1e-3)
    assert asked.link_half_duplex == (both_ways > 1.5 * one_way)


def test_a_half_duplex_link_is_slower_where_both_send_at_once() -> None:
    """As fast in one direction; 1F1B's exchanges take twice as long."""
    asked = add_plan_args(ArgumentParser()).parse_args(plan_flags(measured(0.02, 0.04)).split())
    half, full = (predict(JOB, replace(rates(asked), half_duplex=is_half)).sla for is_half in (True, False))
    # Seven exchanges between the eight microbatches.
    assert half.step_time - full.step_time == pytest.approx(7 * 0.02, rel=0.01)


def test_a_vocabulary_that_no_flag_tells_is_among_the_flags() -> None:
    """The tokenizer told it, and the operations of the output layer were counted with it."""
    unknown = measured(0.002, 0.002, job=replace(JOB, work=replace(JOB.work, vocabulary=0)))
    assert plan_flags(unknown) == f"{plan_flags(measured(0.002, 0.002))} --padded-vocab-size 256"


def test_the_line_has_both_spreads() -> None:
    found = measured(0.002, 0.0021)
    slower = [[(stage, 2 * forward, 2 * backward) for stage, forward, backward in found.passes[1]]]
    text = summary(replace(found, passes=[found.passes[0], *slower]))
    assert text.startswith(f"1 pair of neighbours: {PAYLOAD / 1e6:.4g} MB in 2 ms one way, 2.1 ms both ways at once; a")
    assert "layers achieve 0.00075 (0.0005-0.001, slowest rank 1) TFLOP/s a rank" in text
    slow = replace(found, exchanges=found.exchanges | {3: (Seconds(1e-5, 1e-5), Seconds(0.004, 0.004))})
    assert summary(slow).startswith(
        f"2 pairs of neighbours: {PAYLOAD / 1e6:.4g} MB in 3 (2-4, slowest rank 3) ms one way"
    )
    alone = replace(found, exchanges={})
    assert summary(alone).startswith("no pipeline, no neighbours; ")
    assert plan_flags(alone) == "--compute-tflops 0.001"


@pytest.mark.parametrize(
    ("size", "with_ring", "most"), [(2, True, 1), (3, True, 3), (4, False, 2), (4, True, 2), (5, True, 3)]
)
def test_no_rank_has_two_neighbours_at_once(size: int, with_ring: bool, most: int) -> None:
    hops = [*range(size - 1), *([size - 1] if with_ring and size > 2 else [])]
    turns = _turns(hops, size)
    assert sorted(hop for turn in turns for hop in turn) == hops
    assert len(turns) == most
    for turn in turns:
        ends = sorted(rank for hop in turn for rank in (hop, (hop + 1) % size))
        assert all(first < second for first, second in pairwise(ends))


def test_passes_are_timed_one_by_one() -> None:
    """As Megatron's schedules call their timers; those of other parts are not."""
    timers, begin = PassTimers(on_gpu=False), time.perf_counter()
    for name, seconds in (("forward-compute", 0.02), ("backward-compute", 0.03), ("forward-compute", 0.01)):
        timers("forward-backward", log_level=1).start(barrier=True)
        timers(name, log_level=2).start()
        time.sleep(seconds)
        timers(name).stop()
        timers("forward-backward").stop()
    forward, backward = timers.taken()
    assert (len(forward), len(backward)) == (2, 1)
    assert forward[0] >= 0.02 and forward[1] >= 0.01 and backward[0] >= 0.03
    assert sum(forward + backward) <= time.perf_counter() - begin
    assert timers.taken() == ([], [])
