"""What ``sla-plan`` says of a run: bytes against a count of single K/V groups, layouts, tables, JSON, flags, files."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given

from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.commands.plan import flags
from sla_megatron.commands.plan.as_json import as_json
from sla_megatron.commands.plan.compute import ModelWork
from sla_megatron.commands.plan.figures import Figures
from sla_megatron.commands.plan.flags import add_plan_args, check_plan_args
from sla_megatron.commands.plan.job import Job, PlanError
from sla_megatron.commands.plan.plot import plot
from sla_megatron.commands.plan.predict import Rates, predict
from sla_megatron.commands.plan.program import Communication
from sla_megatron.commands.plan.report import crossing, in_counts, in_seconds, in_units, report
from sla_megatron.commands.plan.suggest import suggest, virtual_stages
from sla_megatron.commands.plan.traffic import hop_traffic, rank_memory, totals
from sla_megatron.common.errors import FlagError
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.payload import MicrobatchShape

from ...strategies import SLAPlan, route_plans

RATES = Rates(link_bytes=1e9, operations=1e12, link_latency=1e-6)


def job(
    sizes: tuple[int, ...] = (3, 3, 3, 3),
    pipeline_size: int = 4,
    skip_distances: tuple[int, ...] = (9,),
    tensor_parallel_size: int = 1,
    **changes: object,
) -> Job:
    """12 layers of 4 groups of 8, 3 of which skip; 64 positions, 2-byte elements, 8 microbatches a step."""
    layers = sum(sizes)
    whole = Job(
        sla=SLAConfig(layers, 4, skip_distances, 3),
        layout=PipelineLayout.of_sizes(pipeline_size, sizes),
        shape=MicrobatchShape(64, 2, 32, tensor_parallel_size),
        work=ModelWork(num_heads=4, head_size=8, mlp_weights=(8192,) * layers, vocabulary=256),
        element_bytes=2,
        num_gpus=pipeline_size * tensor_parallel_size,
        global_batch_size=16,
        description="three of four groups skip",
    )
    return replace(whole, **changes)


def of_plan(plan: SLAPlan) -> Job:
    """A run with ``plan``."""
    size, layers = plan.layout.pipeline_size, plan.sla.num_layers
    return Job(
        sla=plan.sla,
        layout=plan.layout,
        shape=MicrobatchShape(24, 2, 16, plan.tensor_parallel_size),
        work=ModelWork(num_heads=plan.sla.num_query_groups, head_size=4, mlp_weights=(64,) * layers),
        element_bytes=4,
        num_gpus=size * plan.tensor_parallel_size,
        global_batch_size=2 * 2 * size,
    )


# Bytes


@given(route_plans())
def test_hops_and_their_sums(plan: SLAPlan) -> None:
    """What single keys and values come to is in ``test_plan_variants.py``."""
    of = of_plan(plan)
    hops, sums, size = hop_traffic(of), totals(of), plan.layout.pipeline_size
    hidden, kv = 24 * 2 * 16 * 4, [hop.kv_bytes for hop in hops]
    assert {hop.hidden_bytes for hop in hops} <= {hidden}
    assert [(hop.source_rank, hop.target_rank) for hop in hops] == [
        (h % size, (h + 1) % size) for h in range(len(hops))
    ]
    assert sums.dense == 2 * hidden * len(hops)
    assert sums.payload == sums.dense + 2 * sum(kv)
    assert sums.padded == 2 * len(hops) * (hidden + max(kv, default=0))
    assert sums.payload <= min(sums.relayed, sums.padded)


@given(route_plans())
def test_memory_is_the_residency_of_the_fullest_tensor_rank(plan: SLAPlan) -> None:
    of = of_plan(plan)
    assume(of.runs)
    tensor, hidden = 24 * 2 * 4 * 4, 24 * 2 * 16 * 4
    for memory in rank_memory(of):
        held = [plan.residency(of.schedule, memory.rank, tensor) for tensor in range(plan.tensor_parallel_size)]
        assert memory.resident_bytes == max(one.resident for one in held) * tensor
        assert memory.arriving_kv_bytes == max(one.arriving for one in held) * tensor
        assert memory.arriving_hidden_bytes == memory.arrival_buffers * hidden


def test_further_hidden_states_cross_behind_the_layers_that_make_them() -> None:
    plain = job()
    further = replace(plain, layout=replace(plain.layout, further_tokens=2, further_stage=plain.layout.num_stages - 2))
    *before, last = (hop.hidden_bytes for hop in hop_traffic(plain))
    assert [hop.hidden_bytes for hop in hop_traffic(further)] == [*before, 3 * last]
    assert [hop.kv_bytes for hop in hop_traffic(further)] == [hop.kv_bytes for hop in hop_traffic(plain)]


def test_sequence_parallelism_splits_hidden_states_and_context_parallelism_both() -> None:
    plain = job(tensor_parallel_size=2)
    hidden, kv = hop_traffic(plain)[0].hidden_bytes, hop_traffic(plain)[0].kv_bytes
    for changes, hidden_share, kv_share in (
        ({"sequence_parallel": True}, 2, 1),
        ({"context_parallel_size": 2}, 2, 2),
        ({"context_parallel_size": 2, "sequence_parallel": True}, 4, 2),
    ):
        hop = hop_traffic(replace(plain, shape=replace(plain.shape, **changes)))[0]
        assert (hop.hidden_bytes, hop.kv_bytes) == (hidden // hidden_share, kv // kv_share)


# Layouts


def test_virtual_stages_that_make_kv_local() -> None:
    """Distance 8 on 2 ranks: v = 1 is 8/6 stages; 2, 3 and 6 virtual stages of 3, 2 and 1 layers."""
    of = job((6, 6), pipeline_size=2, skip_distances=(8,), global_batch_size=32)
    found = {one.num_chunks: one for one in virtual_stages(of)}
    assert {chunks: one.layers for chunks, one in found.items()} == {1: 6, 2: 3, 3: 2, 6: 1}
    local = {chunks for chunks, one in found.items() if one.kv_bytes == 0}
    assert local == {3, 6}  # 8 layers are 4 stages of 2 and 8 stages of 1: multiples of 2
    assert all(one.obstacle is None for one in found.values())


def test_virtual_stages_say_what_does_not_run() -> None:
    of = job(global_batch_size=4)
    assert [one.obstacle is None for one in virtual_stages(of)] == [True, False]
    assert "interleaving needs 4 (pipeline size)" in virtual_stages(of)[1].obstacle
    two = job((6, 6), pipeline_size=2, communication=Communication())
    assert virtual_stages(two)[1].obstacle == "interleaving needs 3 pipeline ranks or more"
    assert virtual_stages(job((4, 4, 3), pipeline_size=3, skip_distances=(8,))) == []


def test_suggestions_by_bytes() -> None:
    of = job((6, 6), pipeline_size=2, skip_distances=(8,), num_gpus=4, global_batch_size=32)
    layouts = suggest(of)
    found = [(one.job.layout.pipeline_size, one.job.layout.num_chunks) for one in layouts]
    assert len(set(found)) == len(found)
    assert {size for size, _ in found} == {2, 4}  # 3, 6 and 12 ranks do not divide 4 GPUs
    costs = [(one.totals.kv, one.resident_bytes) for one in layouts]
    assert costs == sorted(costs)
    assert [one.is_given for one in layouts].count(True) == 1
    assert all(one.job.schedule.num_microbatches == 16 // one.job.data_parallel_size for one in layouts)


def test_suggestions_by_step_time_hold_the_given_uneven_layout() -> None:
    heard: list[str] = []
    of = job((2, 4, 4, 2))
    layouts = suggest(of, RATES, heard.append)
    steps = [one.prediction.sla.step_time for one in layouts]
    assert steps == sorted(steps)
    assert [one.job for one in layouts if one.is_given] == [of]
    assert len(heard) == len(layouts)
    assert heard[0] == f"layout 1 of {len(layouts)}: PP 4, 1 stages a rank"


def test_experts_limit_layouts() -> None:
    of = job((6, 6), pipeline_size=2, num_gpus=4)
    assert of.split_evenly(4, 1).runs
    assert not replace(of, expert_gpus=2).split_evenly(4, 1).runs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 15}, "--global-batch-size 15: expected a multiple of 2, --micro-batch-size 2 times"),
        ({"num_gpus": 6}, "6 GPUs do not divide over pipelines of 4 ranks"),
    ],
)
def test_runs_without_a_plan(changes: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Figures.of(job(**changes))


def test_interleaving_without_enough_microbatches() -> None:
    of = job((1,) * 8, skip_distances=(5,), global_batch_size=4)
    with pytest.raises(PlanError, match="^--global-batch-size 4 does not suit 2 virtual stages a rank: interleaving"):
        Figures.of(of)


# Prediction


def test_overhead_is_the_transfers() -> None:
    """One microbatch goes there and back: each hop's K/V are in the way twice."""
    of = job(global_batch_size=2)
    found = predict(of, RATES)
    extra = totals(of).kv / RATES.link_bytes
    assert found.sla.step_time - found.dense.step_time == pytest.approx(extra)
    assert found.overhead == pytest.approx(extra / found.dense.step_time)


def test_no_overhead_where_kv_are_local() -> None:
    local = job((2,) * 6, pipeline_size=2, skip_distances=(8,))
    assert totals(local).kv == 0
    assert predict(local, RATES).overhead == 0
    assert max(one.resident_bytes for one in rank_memory(local)) > 0


# Tables


def test_report_has_every_part() -> None:
    text = report(Figures.of(job(), RATES, with_suggestions=True))
    first_hop = next(line for line in text.splitlines() if line.startswith("    0  0 -> 1"))
    assert first_hop.split() == "0 0 -> 1 8.00 KiB 36.00 KiB 44.00 KiB 5.500 1-3: 1-3".split()
    assert "SLA: three of four groups skip" in text
    assert "GPUs: 4 = TP 1 x CP 1 x PP 4 x DP 1" in text
    assert "Predicted step-time overhead: +" in text
    assert "they differ" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())
    for row in ("hidden states (dense)", "K/V relayed over every hop", "every hop as wide as the widest", "1*"):
        assert row in text


def test_report_says_where_tensor_ranks_differ() -> None:
    text = report(Figures.of(job(tensor_parallel_size=2)))
    assert "of the tensor-parallel rank that holds most; they differ" in text
    assert "Predicted" not in text


def test_report_of_one_stage() -> None:
    text = report(Figures.of(job((12,), pipeline_size=1), RATES))
    assert "One pipeline stage: nothing crosses." in text
    assert "Predicted step-time overhead: +0.00 %" in text


def test_report_without_a_vocabulary() -> None:
    of = job()
    assert "--vocab-size" not in report(Figures.of(of, RATES))
    unknown = replace(of, work=replace(of.work, vocabulary=0))
    assert "--vocab-size" in report(Figures.of(unknown, RATES))


def test_json_holds_the_exact_figures() -> None:
    of = job(tensor_parallel_size=2)
    found = json.loads(as_json(Figures.of(of, RATES, with_suggestions=True)))
    assert found["run"]["tensor_parallel_ranks_differ"] is True
    assert [hop["kv_bytes"] for hop in found["hops"]] == [hop.kv_bytes for hop in hop_traffic(of)]
    assert found["hops"][0]["kv"] == [
        {"layer": m, "reader": m + 9, "groups": [1, 2, 3], "tensors": ["key", "value"]}
        | {"stack_layer": m, "stack_reader": m + 9}
        for m in (1, 2, 3)
    ]
    assert found["ranks"] == [vars(one) for one in rank_memory(of)]
    microbatch, step = found["totals"]["microbatch"], found["totals"]["step"]
    assert microbatch["kv_bytes"] == totals(of).kv
    assert step == {name: 8 * size for name, size in microbatch.items()}
    assert all(type(size) is int for size in (*microbatch.values(), *step.values()))
    assert found["prediction"]["overhead"] == predict(of, RATES).overhead
    assert [one["is_given"] for one in found["suggestions"]].count(True) == 1


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2**20, "1.00 MiB"), (5 * 2**60, "5120.00 PiB")],
)
def test_units_of_bytes(size: int, text: str) -> None:
    assert in_units(size) == text


@pytest.mark.parametrize(("seconds", "text"), [(2, "2.000 s"), (0.0125, "12.500 ms"), (3e-6, "3.0 us"), (0, "0.0 us")])
def test_units_of_time(seconds: float, text: str) -> None:
    assert in_seconds(seconds) == text


def test_crossing_names_each_set_of_groups_once() -> None:
    hops = hop_traffic(job(skip_distances=(9, 5)))
    # Groups 1 and 3 are read 9 layers on, group 2 is read 5 layers on.
    assert crossing(hops[0].shared) == "1-3: 2; 1-3: 1,3"
    assert crossing(hops[2].shared) == "1-3: 1,3; 5-7: 2"
    assert crossing(()) == ""
    # Read by several layers each.
    several = replace(job(), sla=SLAConfig(12, 4, (), 4, (4, 5, 12), "full", "keys", (1, 3)))
    assert crossing(hop_traffic(several)[0].shared) == "1: 0,2 for 4-5,12; 3: 1,3 for 4-5,12"
    assert crossing(hop_traffic(several)[1].shared) == "1: 0,2 for 4-5,12; 3: 1,3 for 4-5,12"


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (1536, "1.54k"), (124_475_904, "124.48M"), (7.24e9, "7.24B"), (2e12, "2.00T")]
)
def test_units_of_counts(count: int, text: str) -> None:
    assert in_counts(count) == text


# Flags


def parsed(*argv: str) -> Namespace:
    parser = add_plan_args(ArgumentParser(allow_abbrev=False))
    return parser.parse_args(argv)


def test_rates_in_bytes_operations_and_seconds() -> None:
    args = parsed("--link-gb-per-s", "50", "--compute-tflops", "400", "--link-latency-us", "10")
    check_plan_args(args)
    assert flags.rates(args) == Rates(50e9, 400e12, 10e-6)
    assert flags.rates(parsed()) is None
    shared = parsed("--link-gb-per-s", "50", "--compute-tflops", "400", "--link-half-duplex")
    assert flags.rates(shared) == Rates(50e9, 400e12, half_duplex=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--link-gb-per-s 50", "--link-gb-per-s 50: expected --compute-tflops beside it"),
        ("--compute-tflops 400", "--compute-tflops 400: expected --link-gb-per-s beside it"),
        ("--link-latency-us 3", "--link-latency-us 3: expected --link-gb-per-s and --compute-tflops beside it"),
        ("--link-half-duplex", "--link-half-duplex True: expected --link-gb-per-s and --compute-tflops beside it"),
        ("--plot a.png", "--plot a.png: expected --link-gb-per-s and --compute-tflops beside it"),
        ("--plot a.pdf", "--plot a.pdf: expected a file name that ends in .png or .svg"),
        ("--plot", "--plot without a value: expected a file name"),
        ("--json no/such/a.json", "--json no/such/a.json: expected a file in a directory that exists"),
        ("--link-gb-per-s 0", "--link-gb-per-s 0: expected gigabytes a second, more than 0"),
        ("--link-gb-per-s nan", "--link-gb-per-s nan: expected gigabytes a second, more than 0"),
        ("--link-latency-us -1", "--link-latency-us -1: expected microseconds, 0 or more"),
        ("--compute-tflops fast", "--compute-tflops fast: expected TFLOP/s, more than 0"),
        ("--compute-tflops", "--compute-tflops without a value: expected TFLOP/s, more than 0"),
        ("--num-gpus 0", "--num-gpus 0: expected an integer >= 1"),
        ("--num-gpus 2.5", "--num-gpus 2.5: expected an integer >= 1"),
    ],
)
def test_flags_refused_in_one_line(argv: str, message: str) -> None:
    with pytest.raises(FlagError) as raised:
        check_plan_args(parsed(*argv.split()))
    assert str(raised.value).startswith(f"sla-megatron: error: {message}")
    assert "\n" not in str(raised.value)


def test_a_file_is_replaced_only_on_request(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    check_plan_args(parsed("--json", str(file)))
    file.touch()
    with pytest.raises(FlagError, match="expected a new file, or --overwrite beside it"):
        check_plan_args(parsed("--json", str(file)))
    check_plan_args(parsed("--json", str(file), "--overwrite"))
    with pytest.raises(FlagError, match="a file in a directory that exists"):
        check_plan_args(parsed("--json", str(tmp_path), "--overwrite"))


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sla_megatron.common.figures.find_spec", lambda name: None)
    with pytest.raises(FlagError, match="matplotlib to be installed: pip install matplotlib"):
        check_plan_args(parsed("--plot", "a.svg", "--link-gb-per-s", "1", "--compute-tflops", "1"))


# The picture


@pytest.mark.parametrize(("name", "start"), [("step.png", b"\x89PNG"), ("step.SVG", b"<?xml")])
def test_plot(name: str, start: bytes, tmp_path: Path) -> None:
    prediction = predict(job(), RATES)
    file = tmp_path / name
    plot(prediction, file)
    drawn = file.read_bytes()
    assert drawn.startswith(start)
    plot(prediction, file)
    assert file.read_bytes() == drawn
    assert list(tmp_path.iterdir()) == [file]


def test_a_plot_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def fail(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).touch()
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        plot(predict(job(), RATES), tmp_path / "step.png")
    assert list(tmp_path.iterdir()) == []
