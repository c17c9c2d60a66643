"""Checkpoints that change the kind of model: a GPT's into the hybrid model of the same layers, and back; exported."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.runs import NO_DROPOUT, argv, figures, train_on_all_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

SAVED_AT, LAST = 2, 3

#: Optimizer state that other layouts, and other kinds of model, can read.
SHARDED = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
LLAMA = {"swiglu": True, "disable_bias_linear": True, "position_embedding_type": "rope"}

#: Models of four layers.
MODELS: dict[str, dict[str, Any]] = {
    # All layers as one tensor; a gated MLP, whose first matrix is stored as two halves.
    "full": LLAMA | {"sla": True, "sla_skip_distance": [1, 2], "qk_layernorm": True},
    # Numbered layers.
    "pruned": {"sla": True, "sla_skip_distance": [1], "sla_num_skip_groups": 4, "sla_kv_projection": "pruned"},
    # An axis of experts beside that of layers.  Megatron stores their optimizer apart where they are on several ranks.
    "experts": LLAMA | {"num_experts": 2, "tensor_model_parallel_size": 1},
}
PATTERNS = {"full": "*-*-|*-*-", "pruned": "*-|*-*-*-", "experts": "*E*E|*E*E"}
PIPELINE = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 1}


def _requests(folder: Path) -> dict[str, dict[str, Any]]:
    """Each model trained as a GPT, mostly at TP=2; loaded as a hybrid one, at PP=2, and saved; that as a GPT again."""
    requests = {}
    for name, model in MODELS.items():
        usual = NO_DROPOUT | SHARDED | {"eval_iters": 0, "train_iters": SAVED_AT}
        gpt, pattern = usual | model, {"hybrid_layer_pattern": PATTERNS[name], "num_layers": None}
        # At the end of a run, which takes no step.
        saved = {what: {"save": folder / name / what, "save_interval": LAST} for what in ("gpt", "hybrid", "back")}
        loaded = {what: {"load": folder / name / what} for what in ("gpt", "hybrid")}
        requests[f"{name}.gpt"] = gpt | saved["gpt"]
        requests[f"{name}.hybrid"] = gpt | pattern | loaded["gpt"] | saved["hybrid"] | PIPELINE
        requests[f"{name}.back"] = gpt | loaded["hybrid"] | saved["back"]
    on = {"train_iters": LAST, "override_opt_param_scheduler": True, "load": folder / "full" / "gpt"}
    requests["gpt-goes-on"] = requests["full.gpt"] | on | {"save": None}
    requests["hybrid-goes-on"] = requests["full.hybrid"] | on | {"save": None}
    # All that upstream takes from a checkpoint, and the settings of --sla.
    of_checkpoint = dict.fromkeys({*LLAMA, "sla", "sla_skip_distance"}) | {"use_checkpoint_args": True}
    requests["hybrid-goes-on"] = requests["hybrid-goes-on"] | of_checkpoint
    requests["fewer-layers"] = requests["full.hybrid"] | {"hybrid_layer_pattern": "*-|*-"}
    return {name: {"argv": argv(**flags)} for name, flags in requests.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    answers = train_on_all_ranks(_requests(folder), 2, folder / "ranks")
    failed = {name: ranks[0]["stderr"] for name, ranks in answers.items() if ranks[0]["status"]}
    assert list(failed) == ["fewer-layers"], failed
    return answers


def _stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by key: weights and optimizer."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    step = folder / f"iter_{SAVED_AT:07d}"
    metadata = FileSystemReader(step).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    load(state, storage_reader=FileSystemReader(step), no_dist=True)
    return state


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(runs: dict[str, list[dict[str, Any]]], folder: Path, name: str) -> None:
    """Weights and optimizer state of the GPT that came back are the bits of the first, under the same keys."""
    first, back = (_stored(folder / name / what) for what in ("gpt", "back"))
    assert sorted(first) == sorted(back)
    assert sum(key.startswith("optimizer.state.exp_avg.decoder.layers.") for key in first) > 0
    assert [key for key, tensor in first.items() if not torch.equal(tensor, back[key])] == []


def test_training_goes_on(runs: dict[str, list[dict[str, Any]]]) -> None:
    """The optimizer came along: the next step of both is the same, but for sums in the order of other layouts."""
    gpt, hybrid = figures(runs["gpt-goes-on"]), figures(runs["hybrid-goes-on"])
    assert gpt["iteration"] == hybrid["iteration"] == [LAST]
    for what in ("loss", "grad_norm"):
        assert hybrid[what] == pytest.approx(gpt[what], rel=1e-6, abs=0)
    assert sum(answer["num_shared"] for answer in runs["hybrid-goes-on"]) > 0


def test_exported_as_the_gpt(runs: dict[str, list[dict[str, Any]]], folder: Path, tmp_path: Path) -> None:
    """Byte for byte, from shards of two stages and of two tensor-parallel ranks."""
    from sla_megatron.commands.convert.commands import megatron_to_hf, open_megatron

    for what in ("gpt", "hybrid"):
        megatron_to_hf(open_megatron(folder / "full" / what), tmp_path / what)
    paths = (tmp_path / "gpt").rglob("*")
    files = sorted(str(path.relative_to(tmp_path / "gpt")) for path in paths if path.is_file())
    assert filecmp.cmpfiles(tmp_path / "gpt", tmp_path / "hybrid", files, shallow=False) == (files, [], [])


def test_other_layers_are_refused(runs: dict[str, list[dict[str, Any]]]) -> None:
    (answer, _) = runs["fewer-layers"]
    assert (answer["status"], answer["loss"]) == (2, [])
    said = "sla-megatron: error: --hybrid-layer-pattern *-|*-: expected an attention layer (*) and an MLP (-, E)"
    assert answer["stderr"].startswith(said) and answer["stderr"].count("\n") == 1
