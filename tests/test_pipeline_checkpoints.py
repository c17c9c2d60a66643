"""Pipelines on four ranks: other schedules, the distributed optimizer, checkpoints that change their layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.pipelines import FOUR_RANKS, MODELS, TWO_RANKS, Layout
from tests.support.runs import CLOSE, argv, figures, train_on_all_ranks

pytestmark = pytest.mark.distributed

SAVED_AT, LAST = 1, 3

SHARDED = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}

#: A pipeline of two and what its checkpoints are loaded at: a pipeline of four, interleaved, none with TP=2, uneven.
SAVED = TWO_RANKS["pp2"]
WHOLE = Layout(1, (8,))
LAYOUTS = {
    "pp4": FOUR_RANKS["pp4"],
    "pp4v2": FOUR_RANKS["pp4v2"],
    "tp2": Layout(1, (8,), tensor=2),
    "tp2pp2v2": FOUR_RANKS["tp2pp2v2"],
    "pp2-uneven": TWO_RANKS["pp2-uneven"],
    "same": SAVED,
    # Of values alone, rows of which are left out: from tensor and pipeline parallelism to neither, and the other way.
    "tp2pp2": FOUR_RANKS["tp2pp2"],
    "one": WHOLE,
}
#: Each layout with one of the models; the first two in another number of stages, interleaved and under TP=2.
CHECKPOINTS = {
    "gqa-full-long-and-short": (SAVED, ("pp4v2", "tp2", "same")),
    "mha-pruned-two-long": (SAVED, ("pp4", "tp2pp2v2", "pp2-uneven")),
    "values-two-sources": (FOUR_RANKS["tp2pp2"], ("one",)),
    "values-two-sources.one": (WHOLE, ("tp2pp2",)),
}

#: 16 layers, one to a virtual stage: distance 12 is three times round the ring, so that K/V never leave their rank.
RANK_LOCAL = {"num_layers": 16, "sla_skip_distance": [12], "pipeline_model_parallel_size": 4}
RANK_LOCAL |= {"num_layers_per_virtual_pipeline_stage": 1}


def _argv(model: str, split: Layout | None, **flags: Any) -> list[str]:
    base = MODELS[model.split(".")[0]].argv() | {
        "train_iters": LAST,
        "lr": 1e-3,
        "eval_iters": 0,
        "tensor_model_parallel_size": 1,
    }
    return argv(**base | {"override_opt_param_scheduler": True} | (split.argv() if split else {}) | flags)


def _requests(folder: Path) -> dict[str, dict[str, Any]]:
    requests = {}
    for model, (saved, layouts) in CHECKPOINTS.items():
        saves = {"save": folder / model, "save_interval": SAVED_AT}
        requests[f"{model}.whole"] = _argv(model, saved, **SHARDED, **saves)
        for name in layouts:
            loads = {"load": folder / model, "ckpt_step": SAVED_AT}
            requests[f"{model}.{name}"] = _argv(model, LAYOUTS[name], **SHARDED, **loads)
    # From one checkpoint: other schedules and optimizers than test_pipeline.py's.
    model = next(iter(CHECKPOINTS))
    load = {"load": folder / model, "ckpt_step": SAVED_AT, "finetune": True, "no_load_optim": True, "no_load_rng": True}
    interleaved = FOUR_RANKS["pp4v2"]
    requests["plain"] = _argv(model, interleaved, **load)
    requests["no-overlap"] = _argv(model, interleaved, **load, no_overlap_p2p_communication=True)
    requests["early-receives"] = _argv(model, interleaved, **load, overlap_p2p_communication_warmup_flush=True)
    requests["distributed-optimizer"] = _argv(model, TWO_RANKS["pp2v2"], **load, **OVERLAP)
    requests["rank-local"] = _argv("mha-full-long", None, **RANK_LOCAL)
    return {name: {"argv": flags, "pipeline": True} for name, flags in requests.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("pipeline-checkpoints")
    return train_on_all_ranks(_requests(folder), 4, folder / "ranks")


@pytest.mark.parametrize(
    ("model", "name"), [(model, name) for model, (_, names) in CHECKPOINTS.items() for name in names]
)
def test_goes_on_in_another_layout(runs: dict[str, list[dict[str, Any]]], model: str, name: str) -> None:
    """Weights and distributed optimizer state, saved in a pipeline: training goes on as if uninterrupted.

    In the same layout bit for bit.
    """
    whole, resumed = figures(runs[f"{model}.whole"]), figures(runs[f"{model}.{name}"])
    assert resumed["iteration"] == list(range(SAVED_AT + 1, LAST + 1))
    for what in ("loss", "grad_norm"):
        tolerance = 0 if name == "same" else CLOSE
        assert resumed[what] == pytest.approx(whole[what][SAVED_AT:], rel=tolerance, abs=0)


@pytest.mark.parametrize("name", ["no-overlap", "early-receives", "distributed-optimizer"])
def test_other_schedules_and_optimizers(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Messages batched or received early, and a distributed optimizer that overlaps its own: the same training."""
    plain, found = figures(runs["plain"]), figures(runs[name])
    for what in ("loss", "grad_norm"):
        assert found[what] == pytest.approx(plain[what], rel=CLOSE)


def test_rank_local_kv_are_not_sent(runs: dict[str, list[dict[str, Any]]]) -> None:
    """PP=4 with four virtual stages, 16 layers, distance 12: no byte of K/V on the wire, and K/V resident."""
    for answer in runs["rank-local"]:
        assert answer["status"] == 0
        for step in answer["steps"]:
            for shapes in (*step["sent"].values(), *step["received"].values()):
                assert shapes
                assert all(shape == [16, 2, 32] for shape in shapes)
            assert step["live"] > 0
        assert answer["alive"] == 0
