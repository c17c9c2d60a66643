"""An example that shares what is not K/V: one tensor, many readers, through Megatron's own trainer and schedules."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import NO_DROPOUT, argv, figures, train_on_all_ranks

pytestmark = pytest.mark.distributed

EXAMPLE = "examples/value_residual/pretrain.py"
#: Layer 1 in stage 0 of four; the others read its values in place, on arrival, and twice where they waited.
LAYERS, SEQUENCE, BATCH, HIDDEN, MICROBATCHES, STEPS = 4, 16, 2, 32, 4, 2
PIPELINE = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RUNS = {
    "pp1": {},
    "pp2v2": PIPELINE,
    "pp2v2-again": PIPELINE,
    "pp2v2-recomputed": PIPELINE | FULL,
}
#: fp32 rounding, in sums of another order.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("value_residual")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every rank's answer in each run; all start from the same weights, and see the same batches."""
    shape = {"num_layers": LAYERS, "seq_length": SEQUENCE, "micro_batch_size": BATCH, "hidden_size": HIDDEN}
    common = shape | NO_DROPOUT | {"tensor_model_parallel_size": 1, "eval_iters": 0, "lr": 1e-3}
    start = {"load": folder / "start", "finetune": True, "no_load_optim": True, "no_load_rng": True}
    requests = {
        "start": argv(**common, train_iters=1, save=folder / "start", save_interval=1),
        "dense": argv(**common, **start, train_iters=STEPS),
    }
    requests |= {name: argv(**common, **start, train_iters=STEPS, **flags) for name, flags in RUNS.items()}
    return train_on_all_ranks(
        {
            name: {"argv": flags, "entry": "sla" if name == "dense" else EXAMPLE, "pipeline": name != "dense"}
            for name, flags in requests.items()
        },
        2,
        folder / "runs",
    )


def gradients(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Of the first step, by name in the whole model."""
    found: dict[str, torch.Tensor] = {}
    for path in (folder / "runs").glob(f"{name}.rank*.pt"):
        found |= torch.load(path)
    return found


@pytest.mark.parametrize("name", ["pp2v2", "pp2v2-recomputed"])
def test_trains_as_without_a_pipeline(runs: dict[str, list[dict[str, Any]]], folder: Path, name: str) -> None:
    """Losses and gradient norms of all steps, and every gradient of the first."""
    found, plain = figures(runs[name]), figures(runs["pp1"])
    assert len(found["loss"]) == STEPS
    for what in ("loss", "grad_norm"):
        assert found[what] == pytest.approx(plain[what], rel=TOLERANCE)
    mine, expected = gradients(folder, name), gradients(folder, "pp1")
    assert expected.keys() <= mine.keys() and len(expected) > 10 * LAYERS
    for parameter, gradient in expected.items():
        error = (mine[parameter].double() - gradient).norm()
        assert error <= TOLERANCE * gradient.norm(), parameter


def test_it_is_not_the_dense_model(runs: dict[str, list[dict[str, Any]]]) -> None:
    dense, ours = figures(runs["dense"])["loss"], figures(runs["pp1"])["loss"]
    assert dense != pytest.approx(ours, rel=10 * TOLERANCE)


def test_repeats_bit_for_bit(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """The three readers' gradients are added in one order."""
    assert figures(runs["pp2v2"]) == figures(runs["pp2v2-again"])
    found, again = gradients(folder, "pp2v2"), gradients(folder, "pp2v2-again")
    assert all(torch.equal(gradient, again[name]) for name, gradient in found.items())


@pytest.mark.parametrize("name", ["pp2v2", "pp2v2-again", "pp2v2-recomputed"])
def test_bytes_are_the_bound_and_nothing_stays(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    """The values cross hop 0 alone, once, for all three readers; each rank keeps them for its second stage."""
    hidden = values = SEQUENCE * BATCH * HIDDEN
    hops = {0: [hidden + values, hidden], 1: [hidden]}
    for rank, answer in enumerate(runs[name]):
        assert answer["alive"] == 0 and answer["num_shared"] > 0
        assert len(answer["steps"]) == STEPS
        for step in answer["steps"]:
            assert step["num_microbatches"] == MICROBATCHES and step["left"] == 0
            for what, direction, whose in (("sent", "next", rank), ("received", "prev", 1 - rank)):
                forward = Counter(map(math.prod, step[what][direction]))
                back = Counter(map(math.prod, step[{"sent": "received", "received": "sent"}[what]][direction]))
                expected = Counter(size for size in hops[whose] for _ in range(MICROBATCHES))
                assert forward == back == expected
            # Between two passes: values of two microbatches that wait for the rank's second stage, and gradients that
            # this has left, of two microbatches on rank 0 and of one on rank 1.  Recomputation holds what it reads too.
            if name != "pp2v2-recomputed":
                assert step["live"] == (4, 3)[rank] * values * 4
