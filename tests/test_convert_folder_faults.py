"""Folders that a checkpoint cannot be made of: one line says what is not understood, and nothing is written."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from sla_megatron.commands.convert import cli
from tests.support.foreign_models import (
    LLAMA3,
    TIED,
    Edit,
    added,
    both,
    configured,
    renamed,
    save_foreign,
    save_ours,
    stored_as,
    torch_files,
    with_head,
    with_tokenizer,
    without,
)

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]


def scaled(**changes: Any) -> Edit:
    return configured(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3, **changes})


def pickled(folder: Path) -> None:
    torch_files(more={"trainer": Fraction(1, 3)})(folder)


def nested(folder: Path) -> None:
    torch_files(more={"optimizer": {"lr": torch.ones(2)}})(folder)


def written(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text) and None


def alone(name: str) -> Edit:
    """An adapter's folder: no model is in it."""

    def edit(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / name).write_text("{}")

    return edit


BIASES = "Megatron has biases in all linear layers, in those of queries, keys and values alone, or in none"
TIES = (
    r"config\.json ties the embeddings \(tie_word_embeddings\), but lm_head\.weight differs from {}: set "
    r"tie_word_embeddings to false in config\.json to keep it, or delete it from the file"
)
#: kind, fields of the model's configuration, what is done to the folder, and the line's end.
REFUSED: dict[str, tuple[str, dict[str, Any], Edit | None, str]] = {
    # The head.
    "gpt2, tied, another head": ("GPT2", {}, with_head(0.1), TIES.format(r"transformer\.wte\.weight")),
    "gpt2, tied by default, another head": (
        *("GPT2", {}, both(configured("tie_word_embeddings"), with_head(0.1))),
        TIES.format(r"transformer\.wte\.weight"),
    ),
    "gpt2, without prefix, another head": (
        *("GPT2", {}, both(with_head(1e-6), renamed(r"^transformer\.", ""))),
        TIES.format(r"wte\.weight"),
    ),
    "llama, tied, another head": ("Llama", TIED, with_head(0.1), TIES.format(r"model\.embed_tokens\.weight")),
    "qwen3, tied, another head, sharded": (
        *("Qwen3", TIED, both(with_head(0.1), torch_files(parts=2))),
        TIES.format(r"model\.embed_tokens\.weight"),
    ),
    "llama, tied, a head of another size": ("Llama", TIED, added("lm_head.weight", torch.ones(104, 32)), "differs"),
    "llama, untied, no head": ("Llama", {}, without("lm_head.weight"), r"tensor lm_head\.weight .* is missing"),
    # Tensors.
    "no layer's norm": ("Llama", {}, without("model.norm.weight"), r"tensor model\.norm\.weight .* is missing"),
    "a classifier": ("Llama", {}, added("score.weight"), r"tensor score\.weight is not part of this architecture"),
    "a head's bias": ("GPT2", {}, added("lm_head.bias"), r"tensor lm_head\.bias is not part"),
    "biases that the architecture has not": (
        *("Mistral", {"sliding_window": None}, added("model.layers.0.self_attn.q_proj.bias")),
        r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is not part",
    ),
    "an adapter that was not merged": (
        "Llama",
        {},
        renamed(r"q_proj\.", "q_proj.base_layer."),
        "q_proj.weight .*missing",
    ),
    "an adapter beside the model": (
        *("Llama", {}, written("adapter_config.json", "{}")),
        r"holds an adapter \(adapter_config\.json\): merge it into its model, and save that",
    ),
    "an adapter alone": ("Llama", {}, alone("adapter_config.json"), r"holds an adapter \(adapter_config\.json\)"),
    "no configuration": ("Llama", {}, alone("README.md"), r"config\.json cannot be read: .*No such file"),
    "whole numbers": (
        "Llama",
        {},
        stored_as(torch.int8, "q_proj"),
        r"q_proj\.weight is stored as int8: expected floating",
    ),
    "double precision": ("Llama", {}, stored_as(torch.float64), "stored as float64: --dtype fp32, bf16, fp16"),
    "a layer too few": ("Llama", {}, configured(num_hidden_layers=3), r"tensor model\.layers\.3\..* is not part"),
    "a layer too many": ("Llama", {}, configured(num_hidden_layers=5), r"tensor model\.layers\.4\..* is missing"),
    "another vocabulary": ("Llama", {}, configured(vocab_size=101), r"embed_tokens\.weight has shape \(100, 32\)"),
    # Files.
    "a pickle of more than tensors": ("Llama", {}, pickled, r"pytorch_model\.bin holds more than tensors"),
    "a trainer's pickle": ("Llama", {}, nested, r"pytorch_model\.bin: optimizer is a dict: expected tensors by name"),
    "a broken pickle": ("Llama", {}, both(torch_files(), written("pytorch_model.bin", "PK")), r"pytorch_model\.bin "),
    "no weights": ("Llama", {}, lambda folder: (folder / "model.safetensors").unlink(), "holds no weights: expected"),
    "a shard that is not there": (
        *(
            "Llama",
            {},
            both(torch_files(parts=2), lambda folder: (folder / "pytorch_model-00002-of-00002.bin").unlink()),
        ),
        r"pytorch_model-00002-of-00002\.bin cannot be read: .*No such file",
    ),
    "an index of nothing": (
        *(
            "Llama",
            {},
            both(
                torch_files(),
                written("pytorch_model.bin.index.json", "{}"),
                lambda f: (f / "pytorch_model.bin").unlink(),
            ),
        ),
        "index.json: expected a weight_map",
    ),
    # Fields.
    "quantised": (
        "Llama",
        {},
        configured(quantization_config={"quant_method": "gptq"}),
        r"quantization_config \(gptq\)",
    ),
    "dynamic": (
        "Llama",
        {},
        configured(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type dynamic: expected default, linear or llama3",
    ),
    "yarn": (
        "Llama",
        {},
        configured("rope_parameters", rope_scaling={"type": "yarn", "factor": 2.0}),
        "rope_type yarn: ",
    ),
    "longrope": (
        "Llama",
        {},
        configured(
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [1.0] * 4,
                "factor": 2.0,
            }
        ),
        "rope_type longrope: ",
    ),
    "llama 3 of another length": (
        "Llama",
        {},
        scaled(original_max_position_embeddings=16),
        "original_max_position_embeddings 16 of rope_type llama3: expected 8192, as Megatron has it",
    ),
    "llama 3 of other wavelengths": (
        "Llama",
        {},
        scaled(high_freq_factor=8.0),
        "high_freq_factor 8.0 of rope_type llama3: expected 4",
    ),
    "a rope for each kind of layer": (
        "Qwen3",
        {},
        configured(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        "rope_parameters full_attention.*: expected the same for all layers",
    ),
    "no layers": ("Llama", {}, configured(num_hidden_layers=0), "num_hidden_layers must be a positive integer"),
    "heads that share no keys": (
        "Llama",
        {},
        configured(num_key_value_heads=3),
        "num_key_value_heads must be a divisor",
    ),
    "part of each head": (
        "Llama",
        {},
        configured(partial_rotary_factor=0.5),
        "partial_rotary_factor 0.5: expected none, or 1",
    ),
    "mistral's own window": (
        "Mistral",
        {},
        configured("sliding_window", max_position_embeddings=8192),
        "sliding_window 4096: expected none, or at least max_position_embeddings, 8192",
    ),
    "qwen2's window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        None,
        "sliding_window 8: expected none",
    ),
    "layers of another type": (
        "Qwen3",
        {},
        configured(layer_types=["full_attention", "chunked_attention"] * 2),
        "layer_types chunked_attention: expected full_attention|layer_types",
    ),
    "biases of attention alone": ("Qwen3", {"attention_bias": True}, None, BIASES),
    "biases of the MLP alone": ("Llama", {"mlp_bias": True}, None, BIASES),
    "a gated gelu": ("Llama", {"hidden_act": "gelu"}, None, "hidden_act gelu with gated_mlp True"),
    "relu": ("GPT2", {"activation_function": "relu"}, None, "hidden_act relu with gated_mlp False"),
    "gpt2, unscaled": ("GPT2", {"scale_attn_weights": False}, None, "scale_attn_weights False: expected True"),
    "gpt2, scaled by layer": (
        "GPT2",
        {"scale_attn_by_inverse_layer_idx": True},
        None,
        "scale_attn_by_inverse_layer_idx True: expected False",
    ),
    "gpt2, cross-attention": (
        "GPT2",
        {},
        configured(add_cross_attention=True),
        "add_cross_attention True: expected False",
    ),
    "text for a number": ("Llama", {}, configured(hidden_size="wide"), r"config\.json cannot be read: .*hidden_size"),
    "a configuration that is a list": (
        "Llama",
        {},
        written("config.json", "[]"),
        r"config\.json: expected an object, not a list",
    ),
    "another architecture": ("Llama", {}, configured(model_type="mamba"), "model_type mamba: expected sla_gpt, llama"),
    "no architecture": ("Llama", {}, configured("model_type"), "model_type None: expected sla_gpt, llama"),
}


def _fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """The one line of ``sla-convert hf-to-megatron hf out --verify``, after which everything is as it was."""
    before = _fingerprint(folder)
    capsys.readouterr()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["sla-convert", "hf-to-megatron", "hf", "out", "--verify"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert _fingerprint(folder) == before and not (folder / "out").exists()
    reading, line = capsys.readouterr().err.splitlines()
    assert reading == "reading hf" and line.startswith("sla-convert: error: ")
    return line


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kind, changes, edit, line = REFUSED[name]
    save_foreign(tmp_path / "hf", kind, **changes)
    if edit is not None:
        edit(tmp_path / "hf")
    assert re.search(line, refusal(tmp_path, monkeypatch, capsys))


@pytest.mark.parametrize(
    ("changes", "edit", "line"),
    [
        ({}, with_head(0.1), TIES.format(r"model\.embed_tokens\.weight")),
        ({"hidden_act": "mish"}, None, "hidden_act mish with gated_mlp False"),
        ({}, configured(num_attention_heads=3), "num_key_value_heads must be a divisor"),
        ({}, configured(sla_skip_groups=[1, 2]), r"sla_skip_groups \[1, 2\] are not spread evenly"),
        ({}, configured(quantization_config={"quant_method": "gptq"}), r"quantization_config \(gptq\)"),
        ({}, added("score.weight"), r"tensor score\.weight is not part"),
    ],
)
def test_our_own_folder_that_is_refused(
    tmp_path: Path,
    changes: dict[str, Any],
    edit: Edit | None,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    save_ours(tmp_path / "hf", **changes)
    if edit is not None:
        edit(tmp_path / "hf")
    assert re.search(line, refusal(tmp_path, monkeypatch, capsys))


LARGER = r"hf: its tokenizer has a token {}, the model's vocabulary is {} \(0 to {}\): resize the model's embeddings"


@pytest.mark.parametrize("rows", [-1, -100])
def test_a_tokenizer_beyond_the_vocabulary(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Tokens that were added without resizing the embeddings: within Megatron's padding, and beyond it."""
    tokens = with_tokenizer(tmp_path, rows, pad_token="<pad>")
    line = refusal(tmp_path, monkeypatch, capsys)
    assert re.search(LARGER.format(tokens - 1, tokens + rows, tokens + rows - 1), line)
