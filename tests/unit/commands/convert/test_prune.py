"""``sla-convert prune``: the same logits without the rows that nobody reads; the expectation is the full export's."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sla_megatron.commands.convert import cli
from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM
from tests.support.foreign_models import save_foreign, save_ours

pytestmark = pytest.mark.filterwarnings("ignore")

GPT2 = {"num_attention_heads": 8, "hidden_size": 64, "sla_skip_groups": [1, 2, 3, 5, 6, 7], "sla_skip_distances": [3]}
LLAMA = {
    **{"position_embedding_type": "rope", "normalization": "RMSNorm", "gated_mlp": True, "hidden_act": "silu"},
    **{"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "num_attention_heads": 8},
    **{"num_key_value_heads": 4, "qk_layernorm": True},
}
SHAPES: dict[str, dict[str, Any]] = {
    "GPT-2": GPT2,
    "Llama": LLAMA,
    "two distances": GPT2 | {"sla_skip_distances": [1, 2]},
    # The last two layers have no keys and values then, nor a norm of keys.
    "all groups skip": LLAMA | {"sla_skip_groups": [0, 1, 2, 3]},
    "values of one layer": GPT2 | {"sla_skip_distances": [], "sla_source_layers": [1], "sla_share": "values"},
    # The last two layers have values alone, and no norm of keys.
    "keys alone, all groups": LLAMA | {"sla_skip_groups": [0, 1, 2, 3], "sla_share": "keys"},
}


def run(monkeypatch: pytest.MonkeyPatch, *words: Path | str) -> Any:
    monkeypatch.setattr(sys, "argv", ["sla-convert", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def logits(model: Any) -> list[Tensor]:
    """Of a prompt, of the tokens that follow it one by one, and of all at once."""
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    found = [(out := model(tokens[:, :9], use_cache=True)).logits]
    found += [model(tokens[:, i : i + 1], past_key_values=out.past_key_values).logits for i in range(9, 12)]
    return [*found, model(tokens).logits]


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_logits_with_fewer_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    full, pruned = tmp_path / "full", tmp_path / "pruned"
    save_ours(full, **SHAPES[name])
    (full / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (full / "additional_chat_templates").mkdir()
    (full / "additional_chat_templates" / "other.jinja").write_text("{{ messages }}")
    save_file({"model.embed_tokens.weight": torch.ones(3, 32)}, full / "megatron_padding.safetensors")
    sharded = ["--max-shard-size", "40KB"] if name == "Llama" else []
    assert run(monkeypatch, "prune", full, pruned, "--verify", *sharded) == 0
    assert re.search(r"logits equal; relative error (0|\d\.\d\de-0[789])", capsys.readouterr().out)

    model = loaded(pruned)
    config = SlaGPTConfig.from_pretrained(full)
    # transformers' own tensors of a pruned model, no more and no fewer: each loads, and has a row for each live group.
    # Engines read every file of the folder itself.
    files = list(pruned.glob("*.safetensors"))
    assert (len(files) > 1) == bool(sharded)
    stored = {key: tensor for path in files for key, tensor in load_file(path).items()}
    config.sla_kv_projection = "pruned"
    expected = SlaGPTForCausalLM(config).state_dict()
    assert {key: t.shape for key, t in stored.items()} == {
        key: t.shape for key, t in expected.items() if key != "lm_head.weight" or not config.tie_word_embeddings
    }
    # As equal as products of another number of rows are, in fp32.
    for found, wanted in zip(logits(model), logits(loaded(full)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    # What else was there came along; the configuration differs by its mode.
    for other in ("tokenizer_config.json", "generation_config.json"):
        assert (pruned / other).read_bytes() == (full / other).read_bytes()
    padding = (full / "megatron_padding.safetensors").read_bytes()
    assert (pruned / "megatron" / "padding.safetensors").read_bytes() == padding
    assert (pruned / "additional_chat_templates" / "other.jinja").is_file()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (full, pruned))
    assert after["sla_kv_projection"] == "pruned"
    assert {k: v for k, v in after.items() if k not in ("auto_map", "sla_kv_projection")}.items() <= before.items()


def dense(folder: Path) -> None:
    save_ours(folder, sla_skip_distances=[], sla_skip_groups=[])


def without_a_tensor(folder: Path) -> None:
    save_ours(folder)
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.self_attn.k_proj.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED = {
    "dense": (dense, "in: a dense model: expected one with skip-layer attention"),
    "pruned": (lambda folder: save_ours(folder, sla_kv_projection="pruned"), "in: pruned already"),
    "another architecture": (lambda folder: save_foreign(folder, "Llama"), "in: model_type llama: expected sla_gpt"),
    "no model": (lambda folder: folder.mkdir(), r"in/config\.json cannot be read"),
    "a tensor is missing": (without_a_tensor, r"tensor model\.layers\.1\.self_attn\.k_proj\.weight .* is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made, line = REFUSED[name]
    made(tmp_path / "in")
    capsys.readouterr()
    assert run(monkeypatch, "prune", tmp_path / "in", tmp_path / "out") == 2
    reading, printed = capsys.readouterr().err.splitlines()
    assert reading == f"reading {tmp_path / 'in'}"
    assert re.search(f"^sla-convert: error: .*{line}", printed)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_result_is_not_replaced_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save_ours(tmp_path / "in")
    assert run(monkeypatch, "prune", tmp_path / "in", tmp_path / "out") == 0
    assert run(monkeypatch, "prune", tmp_path / "in", tmp_path / "out") == 2
    assert "out exists: expected a new folder, or --overwrite" in capsys.readouterr().err
    assert run(monkeypatch, "prune", tmp_path / "in", tmp_path / "out", "--overwrite") == 0
    assert run(monkeypatch, "prune", tmp_path / "in", tmp_path / "in", "--overwrite") == 2
    assert "in holds what is read" in capsys.readouterr().err
