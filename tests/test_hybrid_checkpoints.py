"""Checkpoints that change the kind of model: a GPT's into the hybrid model of the same layers, and back; exported."""

from __future__ import annotations

import filecmp
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sla_megatron.common import checkpoint_contents
from sla_megatron.common.checkpoint_contents import damage
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
    requests |= _looked_into_requests(folder / "looked")
    return {name: {"argv": argv(**flags)} for name, flags in requests.items()}


def _looked_into_requests(folder: Path) -> dict[str, dict[str, Any]]:
    """Trainings whose checkpoints are looked into; the last, since its process stays deterministic."""
    usual = NO_DROPOUT | {"eval_iters": 0, "train_iters": SAVED_AT, "save_interval": LAST, "bf16": True}
    # In shards of the buffers of two data-parallel ranks.
    buffers = usual | {"use_distributed_optimizer": True, "tensor_model_parallel_size": 1}
    # The step after the first that has this learning rate.
    endless = {"train_iters": LAST, "lr": 1e30, "clip_grad": 0.0, "no_check_for_nan_in_loss_and_grad": True}
    return {
        "looked.endless": buffers | endless | {"save": folder / "endless"},
        # Here torch puts NaN into memory that nobody has set.
        "looked.buffers": buffers | {"save": folder / "buffers", "deterministic_mode": True},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    answers = train_on_all_ranks(_requests(folder), 2, folder / "ranks")
    failed = {name: ranks[0]["stderr"] for name, ranks in answers.items() if ranks[0]["status"]}
    assert list(failed) == ["fewer-layers"], failed
    return answers


def _stored(folder: Path, iteration: int = SAVED_AT) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by key: weights and optimizer."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    step = folder / f"iter_{iteration:07d}"
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


def test_a_look_into_each_kind_finds_nothing(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Dense, SLA, experts, GPTs and hybrid models, in any layout; in optimizer buffers whose gaps hold NaN as well."""
    looked = sorted(path for path in folder.glob("*/*/iter_*") if path.parent.name != "endless")
    assert len(looked) == 10 and {path: damage(path) for path in looked} == dict.fromkeys(looked)


def test_the_gaps_of_optimizer_buffers_are_seen(
    runs: dict[str, list[dict[str, Any]]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is let pass is there; once this fails, Megatron sets them, and no exception is needed any more."""
    monkeypatch.setattr(checkpoint_contents, "_ALIGNMENT", 0)
    found = str(damage(folder / "looked" / "buffers" / f"iter_{SAVED_AT:07d}"))
    assert re.fullmatch(r"\S+: optimizer\..*\.bucket_idx_0\.\S+ at \[32\]: 32 of 32 values are not finite, .*", found)


def test_weights_that_training_has_spoiled_are_found(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """As torch's own loader has them."""
    spoiled = folder / "looked" / "endless"
    outside = [key for key, tensor in _stored(spoiled, LAST).items() if not torch.isfinite(tensor).all()]
    found = damage(spoiled / f"iter_{LAST:07d}")
    assert outside and found is not None and found.not_finite and any(f": {key}" in str(found) for key in outside)


def test_one_bit_of_any_file(runs: dict[str, list[dict[str, Any]]], folder: Path, tmp_path: Path) -> None:
    """In the middle of what Megatron wrote from two ranks, and in what it keeps beside the tensors."""
    step = folder / "experts" / "gpt" / f"iter_{SAVED_AT:07d}"
    files = sorted(path.name for path in step.glob("*.distcp"))
    assert len(files) >= 2
    for name in files:
        copy = shutil.copytree(step, tmp_path / name)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 16
        (copy / name).write_bytes(content)
        assert str(damage(copy)).startswith(f"{name}: "), name
