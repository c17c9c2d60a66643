"""Hugging Face folders as people have them: Megatron's logits are transformers' own, or one line says what is not.

What is expected of a folder is what ``AutoModelForCausalLM.from_pretrained`` computes with it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from sla_megatron.commands.convert import cli
from tests.support.foreign_models import VOCABULARY, edit_config, put_tensors, save_foreign, tensors
from tests.support.tokenizers import hugging_face_folder

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
Edit = Callable[[Path], None]


def configured(*without: str, **changes: Any) -> Edit:
    return lambda folder: edit_config(folder, *without, **changes)


def with_head(change: float = 0.0, only: bool = False, kind: torch.dtype | None = None) -> Edit:
    """A copy of the embeddings as ``lm_head.weight``, ``change`` off."""

    def edit(folder: Path) -> None:
        found = tensors(folder)
        (name,) = (n for n in found if n.endswith(("embed_tokens.weight", "wte.weight")))
        found["lm_head.weight"] = (found[name] + change).to(kind or found[name].dtype)
        if only:
            del found[name]
        put_tensors(folder, found)

    return edit


def renamed(old: str, new: str) -> Edit:
    return lambda folder: put_tensors(folder, {re.sub(old, new, n): t for n, t in tensors(folder).items()})


def without(name: str) -> Edit:
    return lambda folder: put_tensors(folder, {n: t for n, t in tensors(folder).items() if n != name})


def added(name: str, tensor: Any = None) -> Edit:
    return lambda folder: put_tensors(folder, {**tensors(folder), name: torch.ones(3) if tensor is None else tensor})


def stored_as(kind: torch.dtype, of: str = "") -> Edit:
    return lambda folder: put_tensors(folder, {n: t.to(kind) if of in n else t for n, t in tensors(folder).items()})


def torch_files(parts: int = 1, old: bool = False, more: dict[str, Any] | None = None) -> Edit:
    """``pytorch_model.bin``, or several and their index."""

    def edit(folder: Path) -> None:
        found = list(tensors(folder).items())
        (folder / "model.safetensors").unlink()
        names = [f"pytorch_model-{i:05d}-of-{parts:05d}.bin" for i in range(1, parts + 1)]
        names = names if parts > 1 else ["pytorch_model.bin"]
        for i, name in enumerate(names):
            # Old files cannot be mapped into memory.
            torch.save({**dict(found[i::parts]), **(more or {})}, folder / name, _use_new_zipfile_serialization=not old)
        if parts > 1:
            index = {"metadata": {}, "weight_map": {n: names[i] for i in range(parts) for n, _ in found[i::parts]}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    return edit


def sharded(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits] and None


TIED = {"tie_word_embeddings": True}
#: kind, fields of the model's configuration, and what is done to the saved folder.
EQUAL: dict[str, tuple[str, dict[str, Any], Edit | None]] = {
    # The head.
    "llama, tied, with an equal head": ("Llama", TIED, with_head()),
    "qwen3, tied, with an equal head": ("Qwen3", TIED, with_head()),
    "gpt2, tied, with an equal head": ("GPT2", {}, with_head()),
    "gpt2, untied": ("GPT2", {"tie_word_embeddings": False}, None),
    "llama, tied, the head alone": ("Llama", TIED, with_head(only=True)),
    # Names and files.
    "gpt2, saved without its head": ("GPT2", {}, renamed(r"^transformer\.", "")),
    "llama, tied, saved without its head": ("Llama", TIED, renamed(r"^model\.", "")),
    "gpt2, with masks": ("GPT2", {}, added("transformer.h.0.attn.bias", torch.ones(1, 1, 24, 24))),
    "llama, with frequencies": ("Llama", {}, added("model.layers.0.self_attn.rotary_emb.inv_freq")),
    "llama, sharded": ("Llama", {}, sharded),
    "pytorch_model.bin": ("Llama", {}, torch_files()),
    "pytorch_model.bin, with an equal head": ("GPT2", {}, both(with_head(), torch_files())),
    "pytorch_model.bin, before torch 1.6": ("GPT2", {}, torch_files(old=True)),
    "pytorch_model.bin, sharded": ("Qwen2", {}, torch_files(parts=3)),
    "norms in fp32 alone": ("Llama", {}, both(stored_as(torch.bfloat16), stored_as(torch.float32, "norm"))),
    # What a configuration leaves out, and how old and new ones say the same.
    "llama, no heads of keys, no head_dim": (
        "Llama",
        {"num_key_value_heads": 4},
        configured("num_key_value_heads", "head_dim", "rope_parameters", "attention_bias", "tie_word_embeddings"),
    ),
    "llama, no length, no activation, no epsilon": (
        "Llama",
        {"max_position_embeddings": 2048},
        configured("max_position_embeddings", "hidden_act", "rms_norm_eps", "initializer_range"),
    ),
    "gpt2, no activation": ("GPT2", {}, configured("activation_function", "n_inner", "layer_norm_epsilon")),
    "gpt2, as released": ("GPT2", {}, configured("n_inner", n_ctx=24)),
    "gpt2, another n_inner": ("GPT2", {"n_inner": 80}, None),
    "gpt2, transformers 4's names": (
        "GPT2",
        {},
        configured(*("n_embd", "n_layer", "n_head"), hidden_size=32, num_hidden_layers=4, num_attention_heads=4),
    ),
    "llama, rope of transformers 4": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        configured("rope_parameters", rope_theta=500.0, rope_scaling=None),
    ),
    "llama 3.1, rope of transformers 4": (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}, "max_position_embeddings": 9000},
        configured("rope_parameters", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}),
    ),
    "llama 3.1, rope of transformers 5": (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}, "max_position_embeddings": 9000},
        None,
    ),
    "linear scaling, of transformers 3": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        configured("rope_parameters", rope_scaling={"type": "linear", "factor": 2.0}),
    ),
    # Fields that change what is computed.
    "gpt2, erf": ("GPT2", {"activation_function": "gelu"}, None),
    "gpt2, gelu_fast": ("GPT2", {"activation_function": "gelu_fast"}, None),
    "gpt2, reordered": ("GPT2", {"reorder_and_upcast_attn": True}, None),
    "llama, swish": ("Llama", {"hidden_act": "swish"}, None),
    "mistral, a field that it does not read": ("Mistral", {"sliding_window": None}, configured(attention_bias=True)),
    "mistral, a window as long as its context": ("Mistral", {"sliding_window": 24}, None),
    "qwen2, a window that is off": ("Qwen2", {"use_sliding_window": False, "sliding_window": 8}, None),
    "qwen2, a window from beyond the last layer": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4},
        None,
    ),
    "llama, padding's embedding": ("Llama", {"pad_token_id": 7}, None),
}


@pytest.mark.parametrize("name", EQUAL)
def test_a_folder_is_converted_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    from sla_megatron.commands.convert.commands import hf_to_megatron, open_megatron
    from sla_megatron.commands.convert.hf_reader import HFSource
    from sla_megatron.commands.convert.verify import THRESHOLD, compare

    kind, changes, edit = EQUAL[name]
    save_foreign(tmp_path / "hf", kind, **changes)
    if edit is not None:
        edit(tmp_path / "hf")
    hf_to_megatron(HFSource(tmp_path / "hf"), tmp_path / "out")
    assert compare(open_megatron(tmp_path / "out"), tmp_path / "hf").relative <= THRESHOLD


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


# Our own models, as transformers saves them.


def save_ours(folder: Path, *left_out: str, **changes: Any) -> None:
    from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
    from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

    torch.manual_seed(4)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    more = {"max_position_embeddings": 24, "initializer_range": 0.3, "sla_skip_distances": [2]}
    skipping = {"sla_skip_groups": [1, 2, 3], "hidden_act": "gelu_pytorch_tanh"}
    SlaGPTForCausalLM(SlaGPTConfig(**shape | more | skipping | changes)).save_pretrained(folder)
    edit_config(folder, *left_out)


@pytest.mark.parametrize(
    ("left_out", "edit"),
    [
        (["intermediate_size", "num_key_value_heads", "head_dim", "sla_layers", "norm_eps", "attention_bias"], None),
        ([], with_head()),
        ([], torch_files(parts=2)),
    ],
)
def test_our_own_folder(tmp_path: Path, left_out: list[str], edit: Edit | None) -> None:
    """With the format's defaults for what is left out, and an equal copy of the embeddings."""
    from sla_megatron.commands.convert.commands import hf_to_megatron, open_megatron
    from sla_megatron.commands.convert.hf_reader import HFSource
    from sla_megatron.commands.convert.verify import THRESHOLD, compare

    save_ours(tmp_path / "hf", *left_out)
    if edit is not None:
        edit(tmp_path / "hf")
    hf_to_megatron(HFSource(tmp_path / "hf"), tmp_path / "out")
    assert compare(open_megatron(tmp_path / "out"), tmp_path / "hf").relative <= THRESHOLD


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


# Vocabularies.


def with_tokenizer(folder: Path, rows: int, **special: str) -> int:
    """A Qwen2 of ``rows`` tokens more than its tokenizer has; returns how many that has."""
    from transformers import AutoTokenizer

    hugging_face_folder(folder / "hf", **special)
    tokens = len(AutoTokenizer.from_pretrained(folder / "hf"))
    save_foreign(folder / "hf", "Qwen2", vocab_size=tokens + rows)
    return tokens


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *command: Path | str) -> tuple[int, str, str]:
    """``sla-convert``: its status, and what it wrote on each stream."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["sla-convert", *map(str, command)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_a_vocabulary_beyond_the_tokenizer(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As in every Qwen2: the model's is the configuration's, there, and back again without the folder it came from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = with_tokenizer(tmp_path, rows)
    hf, out, back = tmp_path / "hf", tmp_path / "out", tmp_path / "back"
    status, said, _ = run(monkeypatch, capsys, "hf-to-megatron", hf, out, "--verify")
    assert status == 0 and "logits equal" in said
    ids = torch.arange(tokens + rows)[None, -20:]
    expected = AutoModelForCausalLM.from_pretrained(hf)(ids).logits
    hf.rename(tmp_path / "elsewhere")
    status, said, _ = run(monkeypatch, capsys, "megatron-to-hf", out, back, "--verify")
    assert status == 0 and f"{out}/release/tokenizer, {tokens} tokens" in said
    model = AutoModelForCausalLM.from_pretrained(back, trust_remote_code=True)
    assert model.config.vocab_size == tokens + rows
    assert torch.allclose(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(back)
    assert len(tokenizer) == tokens and tokenizer.decode(tokenizer("hello")["input_ids"][1:]) == "hello"


LARGER = r"hf: its tokenizer has a token {}, the model's vocabulary is {} \(0 to {}\): resize the model's embeddings"


@pytest.mark.parametrize("rows", [-1, -100])
def test_a_tokenizer_beyond_the_vocabulary(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Tokens that were added without resizing the embeddings: within Megatron's padding, and beyond it."""
    tokens = with_tokenizer(tmp_path, rows, pad_token="<pad>")
    line = refusal(tmp_path, monkeypatch, capsys)
    assert re.search(LARGER.format(tokens - 1, tokens + rows, tokens + rows - 1), line)


@pytest.mark.parametrize("old", [True, False])
def test_llama_3_2_s_factor(tmp_path: Path, old: bool) -> None:
    """32, said as transformers 4 said it and as transformers 5 does: it is passed on."""
    from sla_megatron.commands.convert.hf_reader import HFSource

    scaling = {"rope_type": "llama3", **LLAMA3, "factor": 32.0}
    save_foreign(tmp_path / "hf", max_position_embeddings=9000, rope_parameters={"rope_theta": 5e5, **scaling})
    if old:
        edit_config(tmp_path / "hf", "rope_parameters", rope_theta=5e5, rope_scaling=scaling)
    config = HFSource(tmp_path / "hf").config
    assert (config["rope_scaling"], config["rope_theta"]) == (scaling, 5e5)


def test_a_tokenizer_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The weights are converted all the same, and one line says what is not there."""
    save_foreign(tmp_path / "hf")
    (tmp_path / "hf/tokenizer_config.json").write_text("{}")
    status, _, said = run(monkeypatch, capsys, "hf-to-megatron", tmp_path / "hf", tmp_path / "out")
    assert status == 0 and re.fullmatch("sla-convert: the tokenizer is not carried along: .*\n", said)
    assert not (tmp_path / "out/release/tokenizer").exists()


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
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sla-convert: error: ")
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
