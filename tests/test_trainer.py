"""Megatron's whole trainer on two gloo ranks: with ``--sla`` off, on, and in every company it claims to keep."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from sla_megatron.commands.job.progress.events import logged_steps, newest_events
from sla_megatron.commands.job.progress.steps import first_step, last_step, printed_arguments
from tests.support.launch import ROOT
from tests.support.runs import CLOSE, CPU_FLAGS, ITERATIONS, NO_DROPOUT, argv, train_on_all_ranks

pytestmark = pytest.mark.distributed

SLA = {"sla": True, "sla_skip_distance": 2, "sla_num_skip_groups": 2}
MOE = {"num_experts": 4, "moe_router_topk": 2, "disable_bias_linear": True, "sequence_parallel": True}
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
#: What looks on and changes nothing.
WATCHED = {"log_params_norm": True, "log_num_zeros_in_grad": True, "log_throughput": True, "timing_log_level": 2}
WATCHED |= {"manual_gc": True, "manual_gc_interval": 2, "check_weight_hash_across_dp_replicas_interval": 2}
#: Each token sees itself and the five before it, in every second layer; yarn's positions.
YARN = {"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 8}
WINDOWS = YARN | {"window_size": "5,0", "window_attn_skip_freq": 2}
SGD = {"optimizer": "sgd", "sgd_momentum": 0.9, "weight_decay": 0.1, "lr_decay_style": "linear", "min_lr": 1e-3}

REQUESTS: dict[str, dict[str, Any]] = {
    "upstream": {"argv": [*argv(), *CPU_FLAGS], "entry": "upstream"},
    "off": {"argv": argv()},
    "beyond": {"argv": argv(sla=True, sla_skip_distance=4)},
    "no-groups": {"argv": argv(sla=True, sla_num_skip_groups=0)},
    "sla": {"argv": argv(**SLA)},
    "sla-again": {"argv": argv(**SLA)},
    "own-script": {
        "argv": argv(**SLA, my_flag="x"),
        "entry": str(ROOT / "examples" / "own_script" / "pretrain_my_gpt.py"),
    },
    "moe": {"argv": argv(**MOE)},
    "moe-beyond": {"argv": argv(**MOE, sla=True, sla_skip_distance=4)},
    "moe-sla": {"argv": argv(**MOE, **SLA)},
    "tp2": {"argv": argv(**SLA, **NO_DROPOUT)},
    "tp1": {"argv": argv(**SLA, **NO_DROPOUT, tensor_model_parallel_size=1)},
    "sequence-parallel": {"argv": argv(**SLA, **NO_DROPOUT, sequence_parallel=True)},
    "full-recompute": {"argv": argv(**SLA, **NO_DROPOUT, **FULL_RECOMPUTE, sequence_parallel=True)},
    "full-recompute-dropout": {"argv": argv(**SLA, **FULL_RECOMPUTE)},
    "selective-recompute": {
        "argv": argv(**SLA, **NO_DROPOUT, recompute_granularity="selective", recompute_modules=["core_attn"])
    },
    "distributed-optimizer": {
        "argv": argv(
            **SLA,
            **NO_DROPOUT,
            tensor_model_parallel_size=1,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        )
    },
    "pruned": {"argv": argv(**SLA, sla_kv_projection="pruned")},
    "pruned-overlap": {
        "argv": argv(
            sla=True,
            sla_skip_distance=1,
            sla_num_skip_groups=4,
            sla_kv_projection="pruned",
            qk_layernorm=True,
            tensor_model_parallel_size=1,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        )
    },
    "bf16": {"argv": argv(**SLA, **NO_DROPOUT, bf16=True)},
    "sdpa": {"argv": argv(**SLA, **NO_DROPOUT, core_attention="sdpa")},
    "sdpa-selective-recompute": {
        "argv": argv(
            **SLA,
            **NO_DROPOUT,
            core_attention="sdpa",
            recompute_granularity="selective",
            recompute_modules=["core_attn"],
        )
    },
    "watched": {"argv": argv(**SLA, **WATCHED)},
    "yarn": {"argv": argv(**SLA, **NO_DROPOUT, **YARN)},
    "windows": {"argv": argv(**SLA, **NO_DROPOUT, **WINDOWS)},
    "windows-tp1": {"argv": argv(**SLA, **NO_DROPOUT, **WINDOWS, tensor_model_parallel_size=1)},
    "sgd": {"argv": argv(**SLA, **NO_DROPOUT, **SGD)},
    "sgd-tp1": {"argv": argv(**SLA, **NO_DROPOUT, **SGD, tensor_model_parallel_size=1)},
    "dense": {"argv": argv(**NO_DROPOUT)},
    "dense-sdpa": {"argv": argv(**NO_DROPOUT, core_attention="sdpa")},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The first rank's answer of each run; and what the last one printed, and where TensorBoard's files are."""
    folder = tmp_path_factory.mktemp("trainer")
    events = ["--tensorboard-dir", str(folder / "tensorboard"), "--log-timers-to-tensorboard"]
    watched = REQUESTS["watched"] | {"argv": [*REQUESTS["watched"]["argv"], *events]}
    answers = train_on_all_ranks(REQUESTS | {"watched": watched}, 2, folder)
    more = {
        name: {"last rank": of_ranks[-1]["stdout"], "events": folder / "tensorboard"}
        for name, of_ranks in answers.items()
    }
    return {name: of_ranks[0] | more[name] for name, of_ranks in answers.items()}


@pytest.mark.parametrize("name", REQUESTS)
def test_trains_and_evaluates(runs: dict[str, dict[str, Any]], name: str) -> None:
    """Every run takes all its steps with finite losses, evaluates, and ends with status 0."""
    run = runs[name]
    assert run["status"] == 0
    assert run["iteration"] == list(range(1, ITERATIONS + 1))
    assert all(math.isfinite(value) for value in run["loss"] + run["grad_norm"] + run["evaluations"])
    assert len(run["evaluations"]) == 2, "validation and test"


def test_what_it_logs_is_read(runs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """``sla-job show`` finds the losses that the run had, in what this Megatron prints and in TensorBoard's files."""
    run = runs["watched"]
    for name in ("stdout", "last rank"):
        (tmp_path / name).write_text(run[name])
    printed = first_step(tmp_path / "last rank"), last_step(tmp_path / "last rank")
    assert last_step(tmp_path / "stdout") is None
    for first, last in (printed, logged_steps(newest_events(run["events"]))):
        assert (first.iteration, last.iteration) == (1, ITERATIONS)
        assert (first.loss, last.loss) == pytest.approx((run["loss"][0], run["loss"][-1]), rel=1e-6)
        assert last.batch == 8 and 0 < last.seconds < 60 and 0 < last.time - first.time < 600
    assert (printed[1].last, printed[1].samples) == (ITERATIONS, 8 * ITERATIONS)
    assert printed_arguments(tmp_path / "stdout")["seq_length"] == "16"


@pytest.mark.parametrize("name", REQUESTS)
def test_no_shared_kv_outlives_its_step(runs: dict[str, dict[str, Any]], name: str) -> None:
    """After each step every shared key and value is freed; without skipping none is ever made."""
    assert runs[name]["alive"] == 0
    skips = name not in ("upstream", "off", "moe", "beyond", "moe-beyond", "no-groups", "dense", "dense-sdpa")
    assert (runs[name]["num_shared"] > 0) == skips


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("off", "upstream"),
        ("beyond", "upstream"),
        ("no-groups", "upstream"),
        ("moe-beyond", "moe"),
        ("sla-again", "sla"),
        ("own-script", "sla"),
        ("full-recompute-dropout", "sla"),
        ("watched", "sla"),
    ],
)
def test_bit_for_bit(runs: dict[str, dict[str, Any]], name: str, twin: str) -> None:
    """Losses, gradient norms and evaluations are the very same numbers, dropout included."""
    for what in ("loss", "grad_norm", "evaluations"):
        assert runs[name][what] == runs[twin][what]


@pytest.mark.parametrize(
    ("name", "dense"),
    [("sla", "off"), ("moe-sla", "moe"), ("pruned", "sla"), ("yarn", "tp2"), ("windows", "yarn"), ("sgd", "tp2")],
)
def test_settings_matter(runs: dict[str, dict[str, Any]], name: str, dense: str) -> None:
    """Skipping, and leaving projections out, are not silently ignored."""
    assert runs[name]["loss"] != runs[dense]["loss"]


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("tp1", "tp2"),
        ("sequence-parallel", "tp2"),
        ("full-recompute", "tp2"),
        ("selective-recompute", "tp2"),
        ("distributed-optimizer", "tp2"),
        ("sdpa", "tp2"),
        ("sdpa-selective-recompute", "tp2"),
        ("dense-sdpa", "dense"),
        ("windows-tp1", "windows"),
        ("sgd-tp1", "sgd"),
    ],
)
def test_same_training_however_it_is_run(runs: dict[str, dict[str, Any]], name: str, twin: str) -> None:
    """From one seed, without dropout, the same losses and gradient norms as plain TP=2 with Megatron's attention."""
    for what in ("loss", "grad_norm", "evaluations"):
        assert runs[name][what] == pytest.approx(runs[twin][what], rel=CLOSE)


def test_bf16_stays_near_fp32(runs: dict[str, dict[str, Any]]) -> None:
    """bf16 keeps 8 bits, 4e-3; the loss of five small steps stays within a few of those."""
    assert runs["bf16"]["loss"] == pytest.approx(runs["tp2"]["loss"], rel=1e-2)


def test_report_at_start(runs: dict[str, dict[str, Any]]) -> None:
    """A run says what skips, and how many parameters that leaves; the dense figure is what a dense run counts."""
    dense = int(_line(runs["off"], "sla-megatron: off; parameters ").split()[-1])
    assert "distance 2; 2 of 4 K/V groups skip (NSNS); in layers 3-4 of 4" in runs["sla"]["stdout"]
    assert _line(runs["sla"], "sla-megatron: parameters ") == f"sla-megatron: parameters {dense} (dense {dense})"
    # Layers 3 and 4 leave out 2 groups each: K and V, 8 rows a head, 32 columns and a bias.
    left_out = 2 * 2 * 2 * 8 * 33
    pruned = _line(runs["pruned"], "sla-megatron: parameters ")
    assert pruned == f"sla-megatron: parameters {dense - left_out} (dense {dense})"


def test_report_once_more_right_before_training(runs: dict[str, dict[str, Any]]) -> None:
    """Megatron prints hundreds of lines around the report; its last lines come again where nobody has to look."""
    for name in ("off", "sla", "pruned"):
        lines = runs[name]["stdout"].splitlines()
        ours = [number for number, line in enumerate(lines) if line.startswith("sla-megatron: ")]
        said = [lines[number] for number in ours if "parameters" in lines[number] or "groups skip" in lines[number]]
        assert said[: len(said) // 2] == said[len(said) // 2 :] and said
        # Above them is Megatron's last line before the first step, below them what it says after that step alone.
        assert lines[ours[-1] - len(said) // 2].startswith("[before the start of training step]")
        assert "(after 1 iterations)" in "".join(lines[ours[-1] : ours[-1] + 15])


def _line(run: dict[str, Any], start: str) -> str:
    (line,) = {line for line in run["stdout"].splitlines() if line.startswith(start)}
    return line
