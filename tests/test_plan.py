"""The command ``sla-plan``, its bytes against the transport's, and its transfers against Megatron's schedules."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from sla_megatron import cpu_backend
from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.commands.plan import cli
from sla_megatron.commands.plan.compute import ModelWork
from sla_megatron.commands.plan.job import Job
from sla_megatron.commands.plan.program import RECEIVE, RUN, SEND, WAIT, Communication, Pipeline, operations
from sla_megatron.commands.plan.traffic import hop_traffic, totals
from sla_megatron.common.presets import preset_flags
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.payload import MicrobatchShape
from sla_megatron.pipeline.schedule import Schedule
from tests.support import runs
from tests.support.launch import ROOT
from tests.support.pipelines import HIDDEN, LAYOUTS, MICRO_BATCH, MODELS, SEQUENCE, hop_elements
from tests.unit.pipeline import test_schedule

# Of Megatron's own making.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:'type' is deprecated:DeprecationWarning")

MODEL = [
    *"--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --group-query-attention --num-query-groups 8".split(),
    *"--seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1 --bf16 --swiglu".split(),
]


SlaPlan = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def sla_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> SlaPlan:
    """The command as a launcher with other ranks would start it, but in this process, which has Megatron imported.

    Documented commands are started as processes in test_readme.py.
    """

    def run(*argv: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["sla-plan", *MODEL, *argv])
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setenv("WORLD_SIZE", "16")
        status = 0
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code
        return subprocess.CompletedProcess(sys.argv, status, *capsys.readouterr())

    return run


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line with which the command ended."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("sla-")]
    # While Megatron is imported, which happens once in a process.
    (line,) = [line for line in said if not line.startswith("sla-plan: asking Megatron what the flags mean, ")]
    assert line.startswith("sla-plan: error: ")
    assert done.stderr.endswith(f"{line}\n")
    assert "Traceback" not in done.stderr
    return line


# The command


def test_interleaved_run_with_everything(sla_plan: SlaPlan, tmp_path: Path) -> None:
    """Distance 18 of 24 layers, 6 of 8 groups: layers 1-6 are read by 19-24, six stages of three layers on."""
    argv = "--sla --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 4"
    argv += " --num-layers-per-virtual-pipeline-stage 3 --global-batch-size 16 --device cuda"
    argv += " --link-gb-per-s 50 --compute-tflops 400 --link-latency-us 10 --suggest"
    done = sla_plan(*argv.split(), "--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "step.svg"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (tmp_path / "step.svg").read_text().startswith("<?xml")

    # Six stages on are two hops on a ring of four: stages 0 and 1 hand three groups of three layers to ranks 2 and 3.
    group = 2 * 4096 * 128 * 2
    assert [hop["hidden_bytes"] for hop in found["hops"]] == [4096 // 2 * 2048 * 2] * 7
    assert [hop["kv_bytes"] for hop in found["hops"]] == [9 * group, 18 * group, 9 * group, 0, 0, 0, 0]
    assert found["run"]["num_gpus"] == 8
    assert {one["num_chunks"]: one["local_to_rank"] for one in found["virtual_stages"]} == {
        1: False,
        2: False,
        3: False,
        6: False,
    }
    assert found["prediction"]["overhead"] > 0
    (given,) = [one for one in found["suggestions"] if one["is_given"]]
    assert given["step_seconds"] == found["prediction"]["sla"]["step_seconds"]
    assert found["suggestions"][0]["step_seconds"] == min(one["step_seconds"] for one in found["suggestions"])

    assert "  1  1 -> 2  8.00 MiB  36.00 MiB  44.00 MiB    5.500  1-6: 1-3,5-7" in done.stdout
    assert f"Predicted step-time overhead: {100 * found['prediction']['overhead']:+.2f} %" in done.stdout
    # Nothing of what Megatron prints while it validates.
    assert done.stdout.startswith("Model: 24 layers")
    assert "arguments" not in done.stdout


def test_hybrid_model_with_layers_that_run_on_gpus_alone(sla_plan: SlaPlan, tmp_path: Path) -> None:
    """Attention layer 1 is read by 3, over hops 0 to 2, past a stage without attention, and layer 2 by 4."""
    pattern = "M*-|E--|-*G|*-|--|*-"
    argv = "--sla --pipeline-model-parallel-size 3 --global-batch-size 6 --sla-skip-distance 2 --num-experts 4"
    argv += " --disable-bias-linear --link-gb-per-s 50 --compute-tflops 400 --suggest"
    done = sla_plan(*argv.split(), f"--hybrid-layer-pattern={pattern}", "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    group = 2 * 4096 * 128 * 2
    # On a ring of three ranks stages 0 and 3 are one's, and 2 and 5.
    assert [hop["kv_bytes"] for hop in found["hops"]] == [0] * 5
    assert found["run"]["hybrid_layer_pattern"] == pattern
    assert found["run"]["attention_layers"] == [2, 8, 10, 14]
    assert {rank["resident_bytes"] > 0 for rank in found["ranks"]} == {True, False}
    assert all(one["hybrid_layer_pattern"].replace("|", "") == "M*-E---*G*---*-" for one in found["suggestions"])

    argv = f"{argv.replace('size 3', 'size 6')} --hybrid-layer-pattern={pattern}"
    done = sla_plan(*argv.split(), "--json", str(tmp_path / "plan.json"))
    crossing = [hop["kv"] for hop in json.loads((tmp_path / "plan.json").read_text())["hops"]]
    first = {"layer": 1, "reader": 3, "groups": [1, 2, 3, 5, 6, 7], "tensors": ["key", "value"]}
    first |= {"stack_layer": 2, "stack_reader": 10}
    second = first | {"layer": 2, "reader": 4, "stack_layer": 8, "stack_reader": 14}
    assert crossing == [[first], [first], [first, second], [second], [second]]
    assert done.stdout.startswith(f"Model: 15 layers {pattern}, 4 of attention, hidden size 2048")
    rows = re.findall(r"^ +(\d) +\d -> \d +16.00 MiB +(\S+ \S+) .* (\S+: \S+|no K/V)$", done.stdout, re.MULTILINE)
    size = f"{6 * group / 2**20:.2f} MiB"
    double = f"{12 * group / 2**20:.2f} MiB"
    shown = [("0", size, "1: 1-3,5-7"), ("1", size, "1: 1-3,5-7"), ("2", double, "1-2: 1-3,5-7")]
    assert rows == [*shown, ("3", size, "2: 1-3,5-7"), ("4", size, "2: 1-3,5-7")]
    assert "attention layers: groups" in done.stdout and "The first: --hybrid-layer-pattern='" in done.stdout


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        ("*-|*-", "--hybrid-layer-pattern *-|*-: expected no | without a pipeline"),
        ("---", "--hybrid-layer-pattern ---: expected at least one attention layer"),
        ("*-*- --pipeline-model-parallel-size 3", "--hybrid-layer-pattern *-*-: expected a | at each stage's end"),
    ],
)
def test_a_pattern_without_a_plan(sla_plan: SlaPlan, pattern: str, line: str) -> None:
    assert line in error_line(sla_plan("--sla", *f"--hybrid-layer-pattern={pattern}".split()))


def test_thousands_of_gpus_uneven_stages_and_experts_as_json(sla_plan: SlaPlan) -> None:
    argv = "--sla --disable-bias-linear --tensor-model-parallel-size 8 --pipeline-model-parallel-size 6"
    argv += " --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --num-layers 22"
    argv += " --sla-skip-distance 16 --num-experts 8 --moe-router-topk 2 --expert-model-parallel-size 2"
    argv += " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --sequence-parallel"
    argv += " --num-gpus 3072 --global-batch-size 4096 --link-gb-per-s 50 --compute-tflops 400 --json -"
    done = sla_plan(*argv.split())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [len(layers) for layers in found["run"]["layers_of_stage"]] == [3, 4, 4, 4, 4, 3]
    assert found["run"]["data_parallel_size"] == 64
    assert found["run"]["num_microbatches"] == 64
    assert found["run"]["tensor_parallel_ranks_differ"] is True
    assert found["virtual_stages"] == []
    forward, backward = (found["prediction"]["dense"][f"{kind}_seconds"] for kind in ("forward", "backward"))
    # Two experts' MLPs, three matrices each; backward passes run the layers a third time.
    weights = 2048 * 128 * (16 + 16 + 2 * 8) + 2 * 3 * 2048 * 5440
    layer = (2 * 4096 * weights + 2 * 4096**2 * 2048) / 8 / 400e12
    assert forward[0] == pytest.approx(3 * layer)
    assert backward[:5] == pytest.approx([3 * seconds for seconds in forward[:5]])
    assert forward[5] - forward[0] == pytest.approx(2 * 4096 * 2048 * 51200 / 8 / 400e12)


@pytest.mark.parametrize(
    ("model", "layout"),
    [("gqa-full-long-and-short", "pp4v2"), ("mha-full-long", "tp2pp2v2"), ("gqa-pruned-two-short", "pp2v2-uneven")],
)
def test_bytes_are_the_bound_on_every_context_parallel_rank(sla_plan: SlaPlan, model: str, layout: str) -> None:
    """The specification's formula, which has ``q / C`` in both of its parts: hidden states and K/V."""
    split, experts = LAYOUTS[layout], {"moe_router_topk": 2, "num_experts": 4, "disable_bias_linear": True}
    for context in (1, 2, 4):
        flags = MODELS[model].argv() | split.argv() | experts | {"context_parallel_size": context}
        # Experts, spread over the same ranks, change nothing that crosses.
        flags |= {"expert_model_parallel_size": context, "expert_tensor_parallel_size": 1, "global_batch_size": 64}
        done = sla_plan(*runs.argv(**flags), "--num-gpus", str(16 * context), "--suggest", "--json", "-")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        size = found["run"]["element_bytes"]
        bounds = [hop_elements(MODELS[model], split, rank) for rank in range(split.tensor)]
        widest = [max(each) // context * size for each in zip(*bounds, strict=True)]
        assert [hop["payload_bytes"] for hop in found["hops"]] == widest
        hidden = SEQUENCE * MICRO_BATCH * HIDDEN // split.tensor // context * size
        assert {hop["hidden_bytes"] for hop in found["hops"]} == {hidden}
        assert found["run"]["context_parallel_size"] == context
        # Another layout keeps the split of the sequence.
        pipelines = {one["pipeline_parallel_size"] * one["data_parallel_size"] for one in found["suggestions"]}
        assert pipelines == {16 // split.tensor}


def test_the_page_on_long_contexts(sla_plan: SlaPlan) -> None:
    """Its command prints the lines that it shows, and without context parallelism the number that it names."""
    page = (ROOT / "docs" / "long_context.md").read_text()
    ((presets, flags),) = re.findall(r'^sla-plan \$\(launch/presets.sh "(.*)"\) (.*)$', page, re.MULTILINE)
    shown = re.search(r"^```\n(GPUs: .*?)^```", page, re.MULTILINE | re.DOTALL)[1].splitlines()
    for names, expected in ((presets, shown), (presets.replace("16k-cp2", "16k"), [])):
        done = sla_plan(*preset_flags(names), *flags.split())
        assert [line for line in expected if line not in done.stdout.splitlines()] == []
    (hop,) = [line for line in done.stdout.splitlines() if line.startswith("    0  0 -> 1  ")]
    assert "  256.00 MiB  " in hop and "has 256 MiB on hop 0" in " ".join(page.split())


def test_values_of_one_layer_for_all_later_ones(sla_plan: SlaPlan, tmp_path: Path) -> None:
    """Half of 8 groups read layer 1's values: over the ring once, three hops of four ranks, to all of 24 layers."""
    argv = "--sla --sla-share values --sla-source-layer 1 --sla-num-skip-groups 0.5 --sla-kv-projection pruned"
    argv += " --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 3 --global-batch-size 16"
    file = tmp_path / "pattern.svg"
    done = sla_plan(*argv.split(), "--json", "-", "--draw", str(file))
    assert done.returncode == 0, done.stderr
    found, values = json.loads(done.stdout), 4 * 4096 * 128 * 2
    assert [hop["kv_bytes"] for hop in found["hops"]] == [values, values, values, 0, 0, 0, 0]
    assert {(one["reader"], *one["tensors"]) for one in found["hops"][0]["kv"]} == {(m, "value") for m in range(2, 25)}
    # Of 2 x 24 x 8 tensors a token layers 2 to 24 have four less; a row of a projection has 2048 weights and a bias.
    costs, dead = found["costs"], 23 * 4
    assert costs["pruned"]["cache_bytes"] == costs["dense"]["cache_bytes"] - dead * 128 * 2 == (384 - dead) * 128 * 2
    assert costs["dense"]["parameters"] - costs["pruned"]["parameters"] == dead * 128 * (2048 + 1)
    assert costs["dense"]["operations"] - costs["pruned"]["operations"] == dead * 128 * 2048 * 2
    assert file.read_text().startswith("<svg ")

    done = sla_plan(*argv.split(), "--draw", "-")
    assert "24  .  1x  .  1x  .  1x  .  1x  7 (rank 3)" in done.stdout and "Each hop" not in done.stdout
    assert "expected a new file, or --overwrite beside it" in error_line(sla_plan(*argv.split(), "--draw", str(file)))


def test_one_pipeline_stage(sla_plan: SlaPlan) -> None:
    done = sla_plan("--sla", "--global-batch-size", "4")
    assert done.returncode == 0, done.stderr
    assert "One pipeline stage: nothing crosses." in done.stdout


def test_without_sla(sla_plan: SlaPlan) -> None:
    assert "add --sla" in error_line(sla_plan("--pipeline-model-parallel-size", "4"))


def test_what_megatron_refuses(sla_plan: SlaPlan) -> None:
    line = error_line(sla_plan("--sla", "--pipeline-model-parallel-size", "5"))
    assert line == (
        "sla-plan: error: Megatron does not accept these flags: "
        "Number of layers should be divisible by the pipeline-model-parallel size"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--plot", "a.png"], "--plot a.png: expected --link-gb-per-s and --compute-tflops beside it"),
        (["--plot", "a.pdf"], "--plot a.pdf: expected a file name that ends in .png or .svg"),
        (["--link-gb-per-s", "5"], "--link-gb-per-s 5: expected --compute-tflops beside it"),
    ],
)
def test_flags_refused_before_megatron_is_imported(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["sla-plan", "--sla", *argv])
    monkeypatch.setattr(cli, "settled_job", lambda: pytest.fail("Megatron was asked"))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"sla-plan: error: {message}")
    assert (printed.out, printed.err.count("\n")) == ("", 1)


# Bytes against the transport


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    with cpu_backend():
        yield


@pytest.mark.parametrize(
    "sla",
    [SLAConfig(12, 4, (7, 3), 3), SLAConfig(12, 4, (), 2, None, "pruned", "values", (1, 5))],
    ids=["distances", "values-of-two-layers"],
)
@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (1, 2, 0, 3, 2, 1, 2, 1)], ids=["v1", "v2"])
def test_bytes_are_what_the_transport_allocates(sizes: tuple[int, ...], sla: SLAConfig, megatron: None) -> None:
    from sla_megatron.pipeline.communicator import PayloadOrder

    job = Job(
        sla=sla,
        layout=PipelineLayout.of_sizes(4, sizes),
        shape=MicrobatchShape(64, 2, 32, tensor_parallel_size=4, sequence_parallel=True),
        work=ModelWork(num_heads=4, head_size=8, mlp_weights=(1,) * 12),
        element_bytes=2,
        num_gpus=16,
        global_batch_size=16,
    )
    sent = Counter[int]()
    for tensor_rank in range(4):
        for rank in range(4):
            order = PayloadOrder.of(job.plan, job.schedule, job.shape, rank, tensor_rank)
            assert len(order.forward_sent) == (len(sizes) // 4 - (rank == 3)) * 8
            for shape in order.forward_sent + order.backward_sent:
                sent[tensor_rank] += math.prod(shape) * job.element_bytes
    by_rank = [
        2 * 8 * 2 * sum(job.shape.payload_elements(job.plan.hop_columns(hop.hop, tensor)) for hop in hop_traffic(job))
        for tensor in range(4)
    ]
    assert [sent[tensor_rank] for tensor_rank in range(4)] == by_rank
    assert totals(job).payload * 8 >= max(by_rank)
    assert totals(job).dense * 8 == min(by_rank)  # group 0 never skips


# Transfers against Megatron's schedules, which run here without processes

Event = tuple[Any, ...]


class Recorder:
    """What upstream's loops do on one rank: passes, transfers posted and waited for, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        recorder = self

        class Log(test_schedule.Log):
            def run(self, one: Any, payload: int | None) -> Any:
                recorder.events.append(("run", one))
                return super().run(one, payload)

        monkeypatch.setattr(test_schedule, "Log", Log)
        monkeypatch.setattr(test_schedule, "stand_in_communicator", self._communicator)
        from megatron.core.pipeline_parallel import schedules as loops

        # There is nothing to free, but upstream waits for what it would free.
        monkeypatch.setattr(loops, "deallocate_output_tensor", lambda *args: None)
        self._upstream = test_schedule.Upstream(monkeypatch)

    def run(self, schedule: Schedule, rank: int, flags: dict[str, bool]) -> list[Event]:
        """The events of ``rank``, and those of reading: which pass was given which payload."""
        self.events = []
        freed = {"deallocate_pipeline_outputs": True} if flags else {}
        log = self._upstream.run(schedule, rank, **flags, **freed)
        return _in_blocks(self.events) + [
            ("read", kind, *use) for kind in "FB" for use in sorted(log.used[kind].items())
        ]

    def _communicator(self, log: Any, size: int, rank: int, config: Any) -> Any:
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        events = self.events

        class Handle:
            def __init__(self, transfer: Event) -> None:
                self.wait = lambda: events.append(("wait", *transfer))

        class Communicator(P2PCommunicator):
            def __init__(self) -> None:
                self.pp_group, self.config = test_schedule.Group(size, rank), config
                self.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size

            def _communicate(
                self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, wait_on_reqs=True, **_: Any
            ) -> Any:
                posted: dict[str, Event] = {}
                for name, result in (("send_next", tensor_send_next), ("send_prev", tensor_send_prev)):
                    if result is not None:
                        posted[name] = ("send", test_schedule._single(result))
                received = {}
                for name, kind, wanted in (("recv_prev", "F", recv_prev), ("recv_next", "B", recv_next)):
                    if wanted:
                        received[kind] = log.receive(kind)
                        posted[name] = ("receive", kind, received[kind])
                events.extend(posted.values())
                if wait_on_reqs:
                    events.extend(("wait", *transfer) for transfer in posted.values())
                handles = None if wait_on_reqs else {name: Handle(transfer) for name, transfer in posted.items()}
                return received.get("F"), received.get("B"), handles

        return Communicator()


def restated(schedule: Schedule, rank: int, communication: Communication) -> list[Event]:
    """The same of ``commands/plan/program.py``."""
    pipeline = Pipeline(schedule)
    events: list[Event] = []
    transfers: dict[int, Event] = {}
    received = Counter[str]()
    reads = []
    for code, what in operations(pipeline, communication, rank):
        if code == RUN:
            events.append(("run", what))
            transfers |= {transfer: ("send", what) for transfer in pipeline.sent(rank, what)}
            reads += [("read", what.kind, what, transfers[transfer][2]) for transfer in pipeline.read(rank, what)]
        elif code == SEND:
            events.append(transfers[what])
        elif code == RECEIVE:
            kind = "F" if what < pipeline.num_hops * schedule.num_microbatches else "B"
            transfers[what] = ("receive", kind, received[kind])
            received[kind] += 1
            events.append(transfers[what])
        else:
            assert code == WAIT
            events.append(("wait", *transfers[what]))
    return _in_blocks(events) + sorted(reads, key=lambda read: (read[1] == "B", read[2]))


def _in_blocks(events: Iterable[Event]) -> list[Event]:
    """Events without waits for what has been waited for; what is posted, or waited for, at one moment has no order."""
    waited: set[Event] = set()
    first: list[Event] = []
    for event in events:
        if event[0] != "wait" or event not in waited:
            first.append(event)
        if event[0] == "wait":
            waited.add(event)
    blocks = groupby(first, key=lambda event: event[0] if event[0] in ("run", "wait") else "post")
    return [event for kind, block in blocks for event in (block if kind == "run" else sorted(block, key=str))]


@pytest.mark.parametrize(("size", "chunks"), [(1, 1), (2, 1), (4, 1), (2, 2), (3, 2), (4, 3)])
def test_transfers_are_upstreams(size: int, chunks: int, megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    # Megatron does not interleave over two ranks without overlap.
    settings = [{}] if chunks == 1 else [*([{}] if size > 2 else []), *test_schedule.OVERLAPPING]
    for count, group in test_schedule.settings_to_try(size, chunks, most=9):
        schedule = test_schedule.allowed(size, chunks, count, group)
        for flags in settings if schedule is not None else []:
            communication = Communication(bool(flags), "overlap_p2p_comm_warmup_flush" in flags)
            for rank in range(size):
                upstream = recorder.run(schedule, rank, flags)
                assert restated(schedule, rank, communication) == upstream, f"rank {rank} of {schedule}, {flags}"
