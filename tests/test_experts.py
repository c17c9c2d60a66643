"""Experts over several ranks, with pipelines and tensor parallelism, against the same experts on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.pipelines import MODELS, Layout
from tests.support.runs import argv, figures, train_on_all_ranks

pytestmark = pytest.mark.distributed

SAVED_AT, STEPS = 1, 2
# As in test_pipeline.py: rounding in sums of another order.
CLOSE = 1e-6

#: Four layers, whose K/V have readers near and far.
MODEL = MODELS["gqa-full-long-and-short"].argv() | {"num_layers": 4, "sla_skip_distance": [3, 1]}
EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "swiglu": True, "moe_ffn_hidden_size": 32}
EXPERTS |= {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
EXPERTS |= {"moe_layer_freq": "[1,1,0,1]", "moe_shared_expert_intermediate_size": 48}

ALL_TO_ALL, EP2 = {"moe_token_dispatcher_type": "alltoall"}, {"expert_model_parallel_size": 2}
WHOLE = Layout(1, (4,))
TENSOR = Layout(1, (4,), tensor=2)
CONTEXT = Layout(1, (4,), context=2)
PIPELINE = Layout(2, (1, 1, 1, 1), (("num_layers_per_virtual_pipeline_stage", 1),))

#: Name -> layout and flags; each against the run without any of them, on four data-parallel ranks.
COMPARED: dict[str, tuple[Layout, dict[str, Any]]] = {
    "ep2-pp2v2-alltoall": (PIPELINE, EP2 | ALL_TO_ALL),
    "ep2-tp2-allgather": (TENSOR, EP2),
    "ep2-cp2-alltoall": (CONTEXT, EP2 | ALL_TO_ALL),
    "ep2-tp2-alltoall": (TENSOR, EP2 | ALL_TO_ALL | {"moe_shared_expert_overlap": True}),
}

#: Upstream interleaves forward and backward passes of layers in half precision alone.
OVERLAPPED = {"overlap_moe_expert_parallel_comm": True}
BF16 = EP2 | ALL_TO_ALL | {"bf16": True, "eval_iters": 1, "eval_interval": 2}


def _argv(split: Layout, **flags: Any) -> list[str]:
    base = MODEL | EXPERTS | {"train_iters": STEPS, "lr": 1e-3, "eval_iters": 0, "override_opt_param_scheduler": True}
    return argv(**base | split.argv() | flags)


def _requests(folder: Path) -> dict[str, dict[str, Any]]:
    requests = {"seed": _argv(WHOLE, train_iters=1, save=folder / "seed", save_interval=1)}
    load = {"load": folder / "seed", "finetune": True, "no_load_optim": True, "no_load_rng": True}
    requests["whole"] = _argv(WHOLE, **load)
    for name, (split, flags) in COMPARED.items():
        saves = {"save": folder / name, "save_interval": SAVED_AT} if name == "ep2-pp2v2-alltoall" else {}
        requests[name] = _argv(split, **load, **flags, **saves)
    requests["bf16.pp2v2"] = _argv(PIPELINE, **load, **BF16)
    requests["overlapped.pp2v2"] = _argv(PIPELINE, **load, **BF16 | OVERLAPPED)
    requests["overlapped.pp1"] = _argv(WHOLE, **load, **BF16 | OVERLAPPED)
    # Layer 1's K/V for nodes of three later layers, on its own rank and the other.
    many = {"sla_skip_distance": None, "sla_source_layer": [1]}
    requests["bf16.many-readers"] = _argv(PIPELINE, **load, **BF16 | many)
    requests["overlapped.many-readers"] = _argv(PIPELINE, **load, **BF16 | many | OVERLAPPED)
    requests["resumed"] = _argv(TENSOR, load=folder / "ep2-pp2v2-alltoall", ckpt_step=SAVED_AT, **EP2)
    return {name: {"argv": flags} for name, flags in requests.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("experts")
    return train_on_all_ranks(_requests(folder), 4, folder / "ranks")


@pytest.mark.parametrize("name", COMPARED)
def test_as_with_all_experts_on_every_rank(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    """The same losses and gradient norms as without expert, tensor, context and pipeline parallelism."""
    expected, found = figures(runs["whole"]), figures(runs[name])
    for what in ("loss", "grad_norm"):
        assert found[what] == pytest.approx(expected[what], rel=CLOSE, abs=0), what


@pytest.mark.parametrize("name", ["pp2v2", "pp1", "many-readers"])
def test_overlapped_with_another_microbatchs_backward_pass(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Layers as nodes of a schedule: the same bits as one pass after the other; without a pipeline to rounding.

    Evaluations run as whole blocks, in the same processes.
    """
    plain = "bf16.many-readers" if name == "many-readers" else "bf16.pp2v2"
    expected, found = figures(runs[plain]), figures(runs[f"overlapped.{name}"])
    for what in ("loss", "grad_norm", "evaluations"):
        tolerance = CLOSE if name == "pp1" else 0
        assert found[what] == pytest.approx(expected[what], rel=tolerance, abs=0), what


def test_a_checkpoint_of_experts_goes_on_in_another_layout(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Saved at EP=2 with an interleaved pipeline, loaded at EP=2 with TP=2: the second step is the second step."""
    expected, found = figures(runs["whole"]), figures(runs["resumed"])
    for what in ("loss", "grad_norm"):
        assert found[what] == pytest.approx(expected[what][SAVED_AT:], rel=CLOSE, abs=0), what


def test_no_kv_is_left(runs: dict[str, list[dict[str, Any]]]) -> None:
    """K/V were shared, and none is alive after a step."""
    for name, ranks in runs.items():
        assert all(answer["num_shared"] > 0 for answer in ranks), name
        assert [answer["alive"] for answer in ranks] == [0] * len(ranks), name
