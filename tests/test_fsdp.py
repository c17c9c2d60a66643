"""FSDP2 (``--use-torch-fsdp2``) on two gloo ranks, against Megatron's own data parallelism.

Each layer is a unit whose parameters are gathered before its forward and its backward pass, and whose gradients are
reduced when the latter ends; shared K/V go past the inputs and outputs that FSDP2 watches for it.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.runs import NO_DROPOUT, argv, train_on_all_ranks

pytestmark = pytest.mark.distributed

#: Sums over the two ranks in another order.
CLOSE = 1e-6

STEPS, SAVED = 3, 2

SHARED = {
    "tensor_model_parallel_size": 1,
    "untie_embeddings_and_output_weights": True,
    "train_iters": STEPS,
    "eval_iters": 0,
} | NO_DROPOUT

MODELS: dict[str, dict[str, Any]] = {
    "full": {"sla": True, "sla_skip_distance": 2, "sla_num_skip_groups": 2},
    "pruned": {"sla": True, "sla_skip_distance": 2, "sla_num_skip_groups": 2, "sla_kv_projection": "pruned"},
    # Layer 1's values are read by all others, which project their own keys alone for these groups.
    "many-readers": {"sla": True, "sla_share": "values", "sla_source_layer": 1, "sla_num_skip_groups": 2}
    | {"sla_kv_projection": "pruned"},
    # No group of layers 2 to 4 reads its own K/V: layers 2 and 3 project them for others alone.
    "all-skip": {"sla": True, "sla_skip_distance": 1, "sla_num_skip_groups": 4, "qk_layernorm": True},
}

#: What FSDP2 is combined with: model, flags.
COMPANIES: dict[str, tuple[str, dict[str, Any]]] = {
    "recomputed": (
        "full",
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    ),
    "stays-gathered": ("all-skip", {"torch_fsdp2_no_reshard_after_forward": True}),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("fsdp")
    flags: dict[str, dict[str, Any]] = {}
    for name, model in MODELS.items():
        flags[f"ddp {name}"] = model
        flags[f"fsdp {name}"] = model | {"use_torch_fsdp2": True}
    for name in ("full", "pruned"):
        flags[f"fsdp {name}"] |= {"save": folder / name, "save_interval": SAVED}
    for name, (model, company) in COMPANIES.items():
        flags[f"fsdp {name}"] = MODELS[model] | company | {"use_torch_fsdp2": True}
    flags["ddp resumed"] = MODELS["full"] | {"load": folder / "full", "ckpt_step": SAVED}
    loaded = MODELS["pruned"] | {"load": folder / "pruned", "ckpt_step": SAVED, "finetune": True, "train_iters": 1}
    flags["ddp loaded"] = loaded
    flags["fsdp loaded"] = loaded | {"use_torch_fsdp2": True}
    requests = {name: {"argv": argv(**SHARED | its)} for name, its in flags.items()}
    return train_on_all_ranks(requests, 2, folder / "ranks")


TWINS = {f"fsdp {name}": f"ddp {name}" for name in MODELS}
TWINS |= {f"fsdp {name}": f"ddp {model}" for name, (model, _) in COMPANIES.items()}


@pytest.mark.parametrize(("name", "twin"), TWINS.items())
def test_trains_as_data_parallelism_does(answers: dict[str, list[dict[str, Any]]], name: str, twin: str) -> None:
    """Losses and gradient norms, and no shared K/V left after a step."""
    (ours, _), (theirs, _) = answers[name], answers[twin]
    assert ours["iteration"] == list(range(1, STEPS + 1))
    for what in ("loss", "grad_norm"):
        assert ours[what] == pytest.approx(theirs[what], rel=CLOSE)
    for rank in answers[name]:
        assert rank["num_shared"] > 0
        assert rank["alive"] == 0


def test_models_differ(answers: dict[str, list[dict[str, Any]]]) -> None:
    """Else each could be taken for another."""
    losses = [answers[f"ddp {name}"][0]["loss"][-1] for name in MODELS]
    assert len(set(losses)) == len(losses)


def test_checkpoints(answers: dict[str, list[dict[str, Any]]]) -> None:
    """Of what FSDP2 saved: data parallelism goes on with model and optimizer, and FSDP2 loads the same model as it."""
    whole, resumed = answers["fsdp full"][0], answers["ddp resumed"][0]
    assert resumed["iteration"] == list(range(SAVED + 1, STEPS + 1))
    for what in ("loss", "grad_norm"):
        assert resumed[what] == pytest.approx(whole[what][SAVED:], rel=CLOSE)
    first, *others = (answers[f"{name} loaded"][0]["loss"] for name in ("fsdp", "ddp"))
    assert others == [pytest.approx(first, rel=CLOSE)]
    # As a fresh model it would have the loss of the first step.
    assert first[0] < answers["fsdp pruned"][0]["loss"][0]
