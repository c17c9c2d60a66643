"""Layers that predict further tokens (``--mtp-num-layers``) behind a skip-layer model, on four ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.pipelines import MODELS, Layout
from tests.support.runs import argv, figures, train_on_all_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

SAVED_AT, STEPS = 1, 2
# As in test_pipeline.py: rounding in sums of another order.
CLOSE = 1e-6

#: Four layers, whose K/V have readers near and far.
MODEL = MODELS["gqa-full-long-and-short"].argv() | {"num_layers": 4, "sla_skip_distance": [3, 1]}
FURTHER = {"mtp_num_layers": 2, "untie_embeddings_and_output_weights": True}
#: Each has parameters of its own; all start from a checkpoint that one run without a pipeline saved.
MODELS_OF_FURTHER: dict[str, dict[str, Any]] = {
    "further": {},
    # Upstream has no tied weights where the last stage predicts further tokens.
    "other": {
        "untie_embeddings_and_output_weights": None,
        "mtp_use_repeated_layer": True,
        "mtp_detach_heads": True,
        "sla_kv_projection": "pruned",
        "sla_num_skip_groups": 2,
    },
}

RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
WHOLE = Layout(1, (4,))
EACH = (("num_layers_per_virtual_pipeline_stage", 1),)
TWO, INTERLEAVED = Layout(2, (2, 2)), Layout(2, (1, 1, 1, 1), EACH)


def _written(pipeline: int, layout: str) -> Layout:
    return Layout(pipeline, (), (("pipeline_model_parallel_layout", layout),))


#: Name -> model, layout and flags; each against the run of its model without any of them.  ``m`` is where a written
#: layout has the further layers: on a stage of their own, or with others on another rank than the last.
COMPARED: dict[str, tuple[str, Layout, dict[str, Any]]] = {
    "pp2": ("further", TWO, {}),
    "pp2v2": ("further", INTERLEAVED, {}),
    "recomputed": ("further", INTERLEAVED, RECOMPUTED | {"core_attention": "sdpa"}),
    "pp4v2-alone": ("further", _written(4, "Et|t|t||t||mm|L"), {}),
    "tp2pp2v2": ("further", Layout(2, (1, 1, 1, 1), EACH, tensor=2), {}),
    "other-pp4-before-the-last": ("other", _written(4, "Et|tt|tmm|L"), {}),
}
ON_FOUR_RANKS = ("pp4v2-alone", "tp2pp2v2", "other-pp4-before-the-last")


def _argv(model: str, split: Layout, **flags: Any) -> list[str]:
    base = MODEL | FURTHER | MODELS_OF_FURTHER[model]
    base |= {"train_iters": STEPS, "lr": 1e-3, "eval_iters": 0, "override_opt_param_scheduler": True}
    return argv(**base | split.argv() | flags)


def _requests(folder: Path) -> dict[str, dict[str, Any]]:
    requests = {}
    for model in MODELS_OF_FURTHER:
        requests[f"{model}.seed"] = _argv(model, WHOLE, train_iters=1, save=folder / model, save_interval=1)
    load = {"finetune": True, "no_load_optim": True, "no_load_rng": True}
    for model in MODELS_OF_FURTHER:
        requests[model] = _argv(model, WHOLE, load=folder / model, **load)
    for name, (model, split, flags) in COMPARED.items():
        saves = {"save": folder / name, "save_interval": SAVED_AT} if name == "pp2v2" else {}
        requests[name] = _argv(model, split, load=folder / model, **load, **flags, **saves)
    loads = {"load": folder / "pp2v2", "ckpt_step": SAVED_AT}
    requests["resumed"] = _argv("further", Layout(1, (4,), tensor=2), **loads)
    # A distance beyond the last layer, and the dense model, from the same weights.
    beyond, dense = {"sla_skip_distance": 4}, {name: None for name in MODEL if name.startswith("sla")}
    for model, flags in (("beyond", beyond), ("dense", dense)):
        requests[model] = _argv("further", WHOLE, load=folder / "further", **load, **flags)
    return {name: {"argv": flags} for name, flags in requests.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("further")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    requests = _requests(folder)
    on_four = {name: requests.pop(name) for name in ON_FOUR_RANKS}
    return train_on_all_ranks(requests, 2, folder / "two") | train_on_all_ranks(on_four, 4, folder / "four")


def _further_losses(answers: list[dict[str, Any]]) -> list[float]:
    """The losses of the further tokens, in each step, as Megatron's trainer printed them."""
    found = [re.findall(r"mtp_\d+ loss: (\S+)", answer["stdout"]) for answer in answers]
    return [float(loss) for losses in found for loss in losses]


@pytest.mark.parametrize("name", COMPARED)
def test_as_without_a_pipeline(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    """The same losses, of the next and of further tokens, gradient norms, and count of parameters."""
    expected, found = runs[COMPARED[name][0]], runs[name]
    for what in ("loss", "grad_norm"):
        assert figures(found)[what] == pytest.approx(figures(expected)[what], rel=CLOSE, abs=0), what
    losses = _further_losses(expected)
    assert len(losses) == STEPS * FURTHER["mtp_num_layers"]
    assert _further_losses(found) == pytest.approx(losses, rel=1e-5)
    counts = [re.findall(r"sla-megatron: parameters (\d+)", answers[0]["stdout"])[0] for answers in (expected, found)]
    assert counts[0] == counts[1]


def test_a_checkpoint_goes_on_in_another_layout(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Saved at PP=2 with virtual stages, loaded with TP=2: the second step is the second step."""
    expected, found = figures(runs["further"]), figures(runs["resumed"])
    for what in ("loss", "grad_norm"):
        assert found[what] == pytest.approx(expected[what][SAVED_AT:], rel=CLOSE, abs=0), what


def test_a_distance_beyond_the_last_layer_is_upstreams_model(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Bit for bit the dense model with further tokens, whose layers are all upstream's."""
    assert figures(runs["beyond"]) == figures(runs["dense"])
    assert _further_losses(runs["beyond"]) == _further_losses(runs["dense"])
    assert figures(runs["beyond"]) != figures(runs["further"])


def test_an_export_leaves_them_out_by_an_option(
    runs: dict[str, list[dict[str, Any]]],
    folder: Path,
    tmp_path: Path,
    convert: Callable[..., tuple[int, str]],
) -> None:
    """With --drop-mtp the export has the trained model's logits; without, one line names the option."""
    export = partial(convert, "megatron-to-hf", folder / "pp2v2", tmp_path / "hf")

    status, line = export("--verify")
    assert (status, list(tmp_path.iterdir())) == (2, [])
    assert re.search(r"^sla-convert: error: --mtp-num-layers 2: .*; --drop-mtp leaves these layers out\n\Z", line, re.M)
    status, printed = export("--verify", "--drop-mtp")
    assert (status, "logits equal" in printed) == (0, True), printed


def test_no_kv_is_left(runs: dict[str, list[dict[str, Any]]]) -> None:
    """None is alive after a step."""
    for name, ranks in runs.items():
        assert [answer["alive"] for answer in ranks] == [0] * len(ranks), name
