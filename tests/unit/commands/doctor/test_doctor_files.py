"""``sla-doctor`` on data, tokenizers and folders: each well, and each with its fault."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sla_megatron.commands.doctor import checkpoint_size, checkpoints, data_files, job
from sla_megatron.commands.doctor.finding import Doubt, Fault, Skipped
from sla_megatron.commands.doctor.folders import nearest_existing
from sla_megatron.commands.doctor.place import Place
from tests.support.indexed_files import write_indexed
from tests.support.runs import argv


def fault_of(examine: Callable[..., str], *arguments: Any, **named: Any) -> str:
    with pytest.raises(Fault) as fault:
        examine(*arguments, **named)
    assert "\n" not in str(fault.value)
    return str(fault.value)


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be made: tests may run as a user who may write anywhere."""

    def refuse(**named: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), named["dir"])

    monkeypatch.setattr(tempfile, "mkstemp", refuse)


# Data


def data_args(**given: Any) -> Namespace:
    names = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    unset = dict.fromkeys((*names, "per_split_data_args_path", "data_cache_path"))
    # Shares of which each is a document of the files here.
    read = {
        "mock_data": False,
        "sft": False,
        "split": "8,1,1",
        "skip_train": False,
        "full_validation": False,
        "eval_iters": 0,
    }
    return Namespace(**{**unset, **read, **given})


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_indexed(tmp_path / "data")


def test_data_that_do(megatron: None, prefix: str, tmp_path: Path) -> None:
    """Blends and files of blends are taken apart as Megatron does; each prefix is read once."""
    expected = "1 prefix, 1000 tokens (uint16), 2e-06 GB"
    assert data_files.data_files(data_args(data_path=[prefix]), 100) == expected
    assert data_files.data_files(data_args(train_data_path=["0.3", prefix, "0.7", prefix]), None) == expected
    (tmp_path / "blend.txt").write_text(f"1 {prefix}")
    assert data_files.data_files(data_args(data_args_path=str(tmp_path / "blend.txt")), 100) == expected
    with pytest.raises(Skipped, match="--mock-data"):
        data_files.data_files(data_args(mock_data=True), 100)


def _cut_bin(prefix: str) -> None:
    os.truncate(f"{prefix}.bin", 1998)


def _cut_idx(prefix: str) -> None:
    os.truncate(f"{prefix}.idx", 500)


def _no_bin(prefix: str) -> None:
    os.unlink(f"{prefix}.bin")


def _other_file(prefix: str) -> None:
    Path(f"{prefix}.idx").write_text("not an index")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_cut_bin, "{prefix}.bin: 1998 bytes, expected 2000 by data.idx"),
        (_cut_idx, "{prefix}.idx: 500 bytes, expected 842 for 40 sequences and 41 document indices"),
        (_no_bin, "{prefix}.bin cannot be read: No such file or directory"),
        (_other_file, "{prefix}.idx is not an index of Megatron's: "),
    ],
)
def test_data_that_do_not(megatron: None, prefix: str, damage: Callable[[str], None], expected: str) -> None:
    damage(prefix)
    text = fault_of(data_files.data_files, data_args(data_path=[prefix, prefix + "absent"]), 100)
    assert text.startswith(expected.format(prefix=prefix))
    assert text.endswith("(and 1 more of 2 prefixes)")


def test_data_that_the_flags_do_not_name(megatron: None, tmp_path: Path) -> None:
    assert "expected --data-path" in fault_of(data_files.data_files, data_args(), 100)
    absent = str(tmp_path / "absent")
    expected = f"--data-args-path: {absent}: No such file or directory"
    assert fault_of(data_files.data_files, data_args(data_args_path=absent), 100) == expected


def test_ids_that_the_type_cannot_hold(megatron: None, prefix: str) -> None:
    with pytest.raises(Doubt, match="holds uint16 ids, up to 65535, and the vocabulary has 65537"):
        data_files.data_files(data_args(data_path=[prefix]), 65537)
    data_files.data_files(data_args(data_path=[prefix]), 65536)


def test_tokenizers(megatron: None, tmp_path: Path) -> None:
    null = Namespace(tokenizer_type="NullTokenizer", vocab_size=127, padded_vocab_size=None)
    assert data_files.vocabulary_size(null) == 127
    padded = Namespace(tokenizer_type="NullTokenizer", vocab_size=127, padded_vocab_size=64)
    assert "--padded-vocab-size 64: expected at least 127" in fault_of(data_files.vocabulary_size, padded)
    absent = Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "absent.model"))
    assert f"SentencePieceTokenizer {tmp_path}/absent.model cannot be read" in fault_of(
        data_files.vocabulary_size, absent
    )


def test_the_cache_folder(megatron: None, prefix: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The flag's, or beside the data; only the node that writes it has to."""
    named, beside = data_args(data_cache_path=str(tmp_path / "cache")), data_args(data_path=[prefix])
    assert data_files.cache_folder(named, True) == f"{tmp_path}/cache (to be made in {tmp_path})"
    assert data_files.cache_folder(beside, True) == f"{tmp_path}/cache"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(Skipped):
        data_files.cache_folder(beside, False)
    request.getfixturevalue("read_only")
    assert "--data-cache-path" in fault_of(data_files.cache_folder, named, True)
    assert "or --data-cache-path" in fault_of(data_files.cache_folder, beside, True)


# Checkpoints


def test_the_folder_to_save_to(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Nothing is left behind, and a folder that is not there is not made."""
    there, later = Namespace(save=str(tmp_path)), Namespace(save=str(tmp_path / "a/b"))
    assert checkpoints.save_folder(there) == str(tmp_path)
    assert checkpoints.save_folder(later) == f"{tmp_path}/a/b (to be made in {tmp_path})"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Skipped):
        checkpoints.save_folder(Namespace(save=None))
    request.getfixturevalue("read_only")
    expected = f"--save {tmp_path}: Permission denied: expected a folder that this user can write to"
    assert fault_of(checkpoints.save_folder, there) == expected


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    save = Namespace(save=str(tmp_path / "file/checkpoints"))
    assert f"{tmp_path}/file is a file: expected a folder" in fault_of(checkpoints.save_folder, save)
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path


def test_one_file_system_for_all_nodes(tmp_path: Path) -> None:
    probe = {"path": str(tmp_path / "probe"), "token": "xyz", "node": "a"}
    Path(probe["path"]).write_text("xyz")
    assert checkpoints.sees_probe(probe, "b") == f"{tmp_path} is the same on all nodes"
    for token, reason in (("other", "another file is there"), ("", "another file"), (None, "No such file")):
        if token is None:
            Path(probe["path"]).unlink()
        else:
            Path(probe["path"]).write_text(token)
        assert f"does not see a file that node a made in {tmp_path} ({reason}" in fault_of(
            checkpoints.sees_probe, probe, "b", within=0
        )
    with pytest.raises(Skipped):
        checkpoints.sees_probe(None, "b")


@pytest.fixture
def settled(megatron: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Namespace]:
    """The job's arguments, alone, for flags in place of those of ``runs.MODEL``."""

    def settle(**changes: Any) -> Namespace:
        changes = {"tensor_model_parallel_size": 1, **changes}
        monkeypatch.setattr(sys, "argv", ["sla-doctor", *argv(**changes)])
        return job.job_args(Place(0, 1, 0, "node", launched=False), None, on_cpu=True)

    return settle


def test_space_for_a_checkpoint(settled: Callable[..., Namespace], tmp_path: Path) -> None:
    """55,488 parameters in fp32, with two moments."""
    args = settled(save=tmp_path / "checkpoints", save_interval=5)
    assert "55488 parameters" in checkpoints.space(args, 127, lambda path: 10**9)
    text = fault_of(checkpoints.space, args, 127, lambda path: 600_000)
    assert text.startswith(f"{tmp_path}/checkpoints: 600 kB free, a checkpoint takes about 666 kB")


def tracker(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(text)


def load_args(folder: Path | None, **given: Any) -> Namespace:
    defaults = {"ckpt_step": None, "pretrained_checkpoint": None, "exit_on_missing_checkpoint": False, "save": None}
    return Namespace(load=None if folder is None else str(folder), **{**defaults, **given})


def test_what_would_be_loaded(tmp_path: Path) -> None:
    """The tracker's iteration, the one of --ckpt-step, or the pretrained checkpoint's."""
    folder = tmp_path / "checkpoints"
    tracker(folder, "7\n")
    (folder / "iter_0000007").mkdir()
    assert checkpoints.load_folder(load_args(folder)) == f"iter_0000007 of {folder}"
    assert "iter_0000005: No such file" in fault_of(checkpoints.load_folder, load_args(folder, ckpt_step=5))
    first = load_args(tmp_path / "new", pretrained_checkpoint=str(folder))
    assert checkpoints.load_folder(first) == f"iter_0000007 of {folder}"
    with pytest.raises(Skipped):
        checkpoints.load_folder(load_args(None))


def test_nothing_to_load(tmp_path: Path) -> None:
    """A first start where it is also saved; hardly meant elsewhere; a fault where a flag says so."""
    new = tmp_path / "new"
    assert "a first start" in checkpoints.load_folder(load_args(new, save=str(new)))
    with pytest.raises(Doubt, match="would start from random weights"):
        checkpoints.load_folder(load_args(new))
    missing = load_args(new, exit_on_missing_checkpoint=True)
    assert "expected a checkpoint, with --exit-on-missing-checkpoint" in fault_of(checkpoints.load_folder, missing)
    missing = load_args(None, pretrained_checkpoint=str(new))
    assert f"--pretrained-checkpoint {new}: expected" in fault_of(checkpoints.load_folder, missing)


def test_a_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    tracker(tmp_path, "7")
    (tmp_path / "iter_0000007").mkdir()
    (tmp_path / "iter_0000007" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert "is not complete: .metadata is missing" in fault_of(checkpoints.load_folder, load_args(tmp_path))
    tracker(tmp_path, "seven")
    assert "'seven': expected a number of iterations" in fault_of(checkpoints.load_folder, load_args(tmp_path))


# Sizes

_GQA = {"group_query_attention": True, "num_query_groups": 2, "num_attention_heads": 8}
_LLAMA = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True}
_MOE = {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_layer_freq": "[0,1,1,0]", "moe_router_topk": 2}

_MOE_HYBRID = {name: value for name, value in _MOE.items() if name != "moe_layer_freq"}

MODELS = {
    "dense": {},
    "sla": {"sla": True, "add_qkv_bias": True, "disable_bias_linear": True},
    "pruned": {"sla": True, "sla_kv_projection": "pruned", "qk_layernorm": True},
    "values-pruned": {"sla": True, "sla_share": "values", "sla_source_layer": [1], "sla_kv_projection": "pruned"},
    "keys-pruned": {
        "sla": True,
        "sla_share": "keys",
        "sla_source_layer": [1],
        "sla_num_skip_groups": 1.0,
        "sla_kv_projection": "pruned",
        "qk_layernorm": True,
    },
    "llama": {**_GQA, **_LLAMA, "untie_embeddings_and_output_weights": True, "qk_layernorm": True, "kv_channels": 8},
    "experts": {**_LLAMA, **_MOE, "moe_shared_expert_intermediate_size": 24},
    "further-tokens": {**_LLAMA, "mtp_num_layers": 2, "sla": True},
    "hybrid": {**_LLAMA, **_MOE_HYBRID, "hybrid_layer_pattern": "*-*E*"},
    "hybrid-pruned": {
        "sla": True,
        "sla_kv_projection": "pruned",
        "qk_layernorm": True,
        "hybrid_layer_pattern": "**-*-*",
    },
    "one-layer-for-further-tokens": {**_LLAMA, **_MOE, "mtp_num_layers": 2, "mtp_use_repeated_layer": True},
}


@pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS)
def test_parameters_are_counted_as_they_are(settled: Callable[..., Namespace], flags: dict[str, Any]) -> None:
    """The count against the model that Megatron builds."""
    from sla_megatron.commands.convert.megatron_model import build, megatron_alone

    args = settled(**flags)
    counted = checkpoint_size.parameter_count(args, 127)
    args.padded_vocab_size = 128
    with megatron_alone():
        built = sum(parameter.numel() for parameter in build(args).parameters())
    assert counted == built


def test_parameters_of_layers_that_run_on_gpus_alone(settled: Callable[..., Namespace]) -> None:
    """Of Mamba layers, as Megatron builds them; of gated delta networks there is no count."""
    from sla_megatron.commands.convert.megatron_model import build, megatron_alone

    args = settled(sla=True, hybrid_layer_pattern="*-*-")
    vars(args).update(padded_vocab_size=128, mamba_head_dim=16, mamba_num_groups=2, hybrid_layer_pattern="M-*M")
    for heads in (None, 16):
        args.mamba_num_heads = heads
        with megatron_alone():
            built = sum(parameter.numel() for parameter in build(args).parameters())
        assert checkpoint_size.parameter_count(args, 127) == built
    vars(args).update(hybrid_layer_pattern="G-*M", transformer_impl="transformer_engine")
    with pytest.raises(Skipped, match="gated delta networks"):
        checkpoint_size.parameter_count(args, 127)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, 4 + 8),
        ({"use_distributed_optimizer": True}, 4 + 12),
        ({"bf16": True}, 2 + 12),
        ({"bf16": True, "no_save_optim": True}, 2),
        ({"optimizer": "sgd"}, 4 + 4),
    ],
)
def test_bytes_of_a_parameter(settled: Callable[..., Namespace], flags: dict[str, Any], expected: int) -> None:
    assert checkpoint_size.checkpoint_bytes(settled(**flags), 10) == 10 * expected


def test_parameters_that_are_not_counted(settled: Callable[..., Namespace]) -> None:
    args = settled()
    args.vocab_size = None
    with pytest.raises(Skipped, match="vocabulary is not known"):
        checkpoint_size.parameter_count(args, None)
    assert args.params_dtype == torch.float32
