"""Hugging Face folders as people have them: Megatron's logits are transformers' own.

What is expected of a folder is what ``AutoModelForCausalLM.from_pretrained`` computes with it.
"""

from __future__ import annotations

import json
import re
import sys
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
    edit_config,
    renamed,
    save_foreign,
    save_ours,
    sharded,
    stored_as,
    torch_files,
    with_head,
    with_tokenizer,
)
from tests.support.tokenizers import hugging_face_folder

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

LLAMA32 = LLAMA3 | {"factor": 32.0}
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
    "llama 3.2, rope of transformers 4": (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA32}, "max_position_embeddings": 9000},
        configured("rope_parameters", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA32}),
    ),
    "llama 3.2, rope of transformers 5": (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA32}, "max_position_embeddings": 9000},
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


# Our own models, as transformers saves them.


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


# Vocabularies.


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
    assert status == 0 and re.fullmatch("reading .*\nsla-convert: the tokenizer is not carried along: .*\n", said)
    assert not (tmp_path / "out/release/tokenizer").exists()


def test_code_in_a_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A Llama's that says that it has a tokenizer and a model of its own."""
    hugging_face_folder(tmp_path / "hf")
    save_foreign(tmp_path / "hf", vocab_size=900)
    (tmp_path / "hf/own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    edit_config(tmp_path / "hf", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    path = tmp_path / "hf/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}))
    assert run(monkeypatch, capsys, "hf-to-megatron", tmp_path / "hf", tmp_path / "out")[0] == 0
    assert (tmp_path / "out/release/tokenizer/tokenizer.json").is_file()
    assert not (tmp_path / "ran").exists()
