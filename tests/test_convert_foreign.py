"""Dense GPT-2, Llama and Megatron models: checkpoints to go on from with ``--sla``, that leave as what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.argument_rows import SWIGLU
from tests.support.convert_models import LAYERS, argv_of, save_random_checkpoint
from tests.support.foreign_models import LLAMA3, save_foreign, tensors
from tests.support.tokenizers import hugging_face_folder

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]


FOREIGN: dict[str, dict[str, Any]] = {
    "gpt2": {"kind": "GPT2"},
    "llama": {},
    "llama-tied-wide-heads": {"tie_word_embeddings": True, "head_dim": 12},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-3.1": {
        **{"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        "max_position_embeddings": 9000,
    },
    "gpt2-untied-erf": {"kind": "GPT2", "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 80},
    "mistral": {"kind": "Mistral", "sliding_window": None},
    "qwen2": {"kind": "Qwen2"},
    "qwen3": {"kind": "Qwen3", "head_dim": 12},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_dense_hugging_face_model(tmp_path: Path, name: str) -> None:
    """Megatron's logits are the original's; as a skip-layer model whose source is the last layer, too.

    Exported as what it was, it is the same files: every tensor, and what transformers reads of the configuration.
    """
    from sla_megatron.commands.convert.commands import hf_to_megatron, megatron_to_hf, open_megatron
    from sla_megatron.commands.convert.dense_to_sla import WithSLA
    from sla_megatron.commands.convert.hf_reader import HFSource
    from sla_megatron.commands.convert.verify import THRESHOLD, compare

    save_foreign(tmp_path / "hf", **FOREIGN[name])
    hf_to_megatron(HFSource(tmp_path / "hf"), tmp_path / "dense")
    dense = open_megatron(tmp_path / "dense")
    assert compare(dense, tmp_path / "hf").relative <= THRESHOLD
    _leaves_as_it_came(dense, tmp_path / "hf", tmp_path / "again")

    # Straight from the folder.
    hf_to_megatron(WithSLA(HFSource(tmp_path / "hf"), sla_source_layer=[LAYERS]), tmp_path / "beyond")
    beyond = open_megatron(tmp_path / "beyond")
    assert beyond.args.sla
    assert compare(beyond, tmp_path / "hf").relative <= THRESHOLD

    # With a distance that skips it is another function; our export of it agrees with Megatron.
    hf_to_megatron(WithSLA(dense, sla_skip_distance=[1]), tmp_path / "skipping")
    skipping = open_megatron(tmp_path / "skipping")
    assert compare(skipping, tmp_path / "hf").relative > 100 * THRESHOLD
    megatron_to_hf(skipping, tmp_path / "exported")
    assert compare(skipping, tmp_path / "exported").relative <= THRESHOLD


def _leaves_as_it_came(dense: Any, hf: Path, again: Path) -> None:
    from transformers import AutoModelForCausalLM

    from sla_megatron.commands.convert.commands import megatron_to_hf
    from sla_megatron.commands.convert.hf_reader import HFSource
    from sla_megatron.commands.convert.verify import THRESHOLD, compare

    megatron_to_hf(dense, again, kind=json.loads((hf / "config.json").read_text())["model_type"])
    assert list(again.rglob("*.py")) == []
    first, second = tensors(hf), tensors(again)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    # Without code of its own.
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (hf, again)]
    assert type(models[0]) is type(models[1])
    before, after = (model.config.to_dict() for model in models)
    # What training began with, and tokens: there is no tokenizer here.
    other = {"_name_or_path", "initializer_range", "bos_token_id", "eos_token_id"}
    assert {name for name in before if before[name] != after[name]} <= other
    assert after.keys() - before.keys() <= {"n_ctx"}
    # By the names of before transformers 5 too.
    written = json.loads((again / "config.json").read_text())
    older = type(models[1].config).from_dict({n: value for n, value in written.items() if n != "rope_parameters"})
    assert older.to_dict().get("rope_parameters") == after.get("rope_parameters")
    assert compare(dense, again).relative <= THRESHOLD
    # And what was read once is read again.
    assert HFSource(again).config == HFSource(hf).config == dense.config
    assert torch.equal(HFSource(again).padding("model.embed_tokens.weight"), dense.padding("model.embed_tokens.weight"))


SLA = {"sla": True, "sla_skip_distance": [1]}
VARIANT = {"sla": True, "sla_source_layer": [1], "sla_share": "values"}
GQA = {"group_query_attention": True, "num_query_groups": 2}
UNTIED = {"untie_embeddings_and_output_weights": True}
ROPE = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True}
RELU2 = {name: value for name, value in SWIGLU.items() if name != "swiglu"} | {"squared_relu": True}
#: Megatron's flags, what such a model is exported as by itself, and what else ``--as`` takes.
LEAVING: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "GPT-2": ({}, "gpt2", ()),
    "GPT-2, exact GELU": ({"no_bias_gelu_fusion": True}, "sla_gpt", ("gpt2",)),
    "GPT-2, untied": (UNTIED, "sla_gpt", ("gpt2",)),
    "GPT-2, another MLP": ({"ffn_hidden_size": 80}, "sla_gpt", ("gpt2",)),
    "GPT-2, grouped": (GQA, "sla_gpt", ()),
    "GPT-2, wide heads": ({"kv_channels": 12}, "sla_gpt", ()),
    "GPT-2, qk norm": ({"qk_layernorm": True}, "sla_gpt", ()),
    "GPT-2, without biases": ({"disable_bias_linear": True}, "sla_gpt", ()),
    "Llama": (SWIGLU, "llama", ("mistral",)),
    "Llama, untied, grouped, wide": (SWIGLU | UNTIED | GQA | {"kv_channels": 12}, "llama", ("mistral",)),
    "Llama, hybrid": (SWIGLU | {"hybrid_layer_pattern": "*-*-"}, "llama", ("mistral",)),
    "Llama, biases": (ROPE, "sla_gpt", ("llama",)),
    "heads of no whole width": (SWIGLU | {"num_attention_heads": 3, "kv_channels": 12}, "mistral", ()),
    "Qwen2": (SWIGLU | {"add_qkv_bias": True}, "qwen2", ()),
    "Qwen2, wide": (SWIGLU | {"add_qkv_bias": True, "kv_channels": 12}, "sla_gpt", ("qwen2",)),
    "Qwen2, qk norm": (SWIGLU | {"add_qkv_bias": True, "qk_layernorm": True}, "sla_gpt", ()),
    "Qwen3": (SWIGLU | {"qk_layernorm": True}, "qwen3", ()),
    "half rotary": (SWIGLU | {"rotary_percent": 0.5}, "sla_gpt", ()),
    "interleaved": (SWIGLU | {"rotary_interleaved": True}, "sla_gpt", ()),
    "norms around zero": (SWIGLU | {"apply_layernorm_1p": True}, "sla_gpt", ()),
    "LayerNorm": (SWIGLU | {"normalization": "LayerNorm"}, "sla_gpt", ()),
    "squared ReLU": (RELU2, "sla_gpt", ()),
    "skipping": (SWIGLU | SLA, "sla_gpt", ()),
    "skipping to a layer, values alone": (SWIGLU | VARIANT, "sla_gpt", ()),
    "a distance beyond the last layer": (SWIGLU | SLA | {"sla_skip_distance": [LAYERS]}, "llama", ("mistral",)),
}


def test_what_a_model_leaves_as(tmp_path: Path) -> None:
    """By itself, and what is refused in a line that says why and what is accepted."""
    from argparse import Namespace

    from sla_megatron.commands.convert.architecture import config_from_args
    from sla_megatron.commands.convert.cli import KINDS
    from sla_megatron.commands.convert.errors import ConvertError
    from sla_megatron.commands.convert.megatron_model import args_of, megatron_alone
    from sla_megatron.commands.convert.to_foreign import chosen

    found, lines = {}, {}
    with megatron_alone():
        made = {name: args_of(argv_of(flags), torch.float32) for name, (flags, _, _) in LEAVING.items()}
    for name, args in made.items():
        source = Namespace(path=Path("ck"), config=config_from_args(args, 100))
        itself, taken = chosen(source), []
        for kind in KINDS:
            try:
                assert chosen(source, kind) == kind
                taken.append(kind)
            except ConvertError as error:
                lines[name, kind] = str(error)
        found[name] = (LEAVING[name][0], itself, tuple(kind for kind in taken if kind not in (itself, "sla_gpt")))
        assert "sla_gpt" in taken
    assert found == LEAVING
    assert len(lines) == sum(5 - len({*others, itself} - {"sla_gpt"}) for _, itself, others in LEAVING.values())
    for (name, kind), line in lines.items():
        assert line.startswith(f"--as {kind}: ck has ") and ": expected " in line, line
        others = {*LEAVING[name][2], LEAVING[name][1], "sla_gpt"}
        assert set(line.rsplit(": expected ", 1)[1].split(" or ")) == others
    for name in ("skipping", "skipping to a layer, values alone"):
        assert lines[name, "llama"] == "--as llama: ck has skip-layer attention: expected sla_gpt"
    assert lines["half rotary", "qwen3"] == ("--as qwen3: ck has qk_layernorm False, qwen3 has True: expected sla_gpt")


def test_the_command_exports_it_as_what_it_is(tmp_path: Path, convert: Callable[..., tuple[int, str]]) -> None:
    """By Megatron's own checkpoints: a GPT-2, and a hybrid model that is a Llama of two layers."""
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM

    save_random_checkpoint(tmp_path / "gpt2", {})
    save_random_checkpoint(tmp_path / "hybrid", SWIGLU | UNTIED | GQA | {"hybrid_layer_pattern": "*-*-"})

    status, said = convert("megatron-to-hf", tmp_path / "gpt2", tmp_path / "no", "--as", "llama")
    (line,) = [line for line in said.splitlines() if line.startswith("sla-convert")]
    expected = "normalization LayerNorm, llama has RMSNorm: expected gpt2 or sla_gpt"
    assert status == 2 and line.startswith("sla-convert: error: --as llama: ") and line.endswith(expected)
    assert not (tmp_path / "no").exists()

    for name, words, kind, said_as in (
        ("gpt2", (), GPT2LMHeadModel, "gpt2 (or --as sla_gpt)"),
        ("hybrid", (), LlamaForCausalLM, "llama (or --as mistral, sla_gpt)"),
        ("hybrid", ("--as", "mistral", "--dtype", "bf16", "--threshold", "1"), MistralForCausalLM, "mistral"),
    ):
        out = tmp_path / f"{name}{len(words)}"
        status, said = convert("megatron-to-hf", tmp_path / name, out, "--verify", *words)
        assert status == 0 and f"written as {said_as}; tokenizer: " in said and "logits equal" in said, said
        model = AutoModelForCausalLM.from_pretrained(out)
        assert type(model) is kind and model.dtype == (torch.bfloat16 if "bf16" in words else torch.float32)
    status, said = convert("describe", tmp_path / "gpt2")
    assert status == 0 and "exported as: gpt2 (or --as sla_gpt)" in said
    assert "transformer.h.3.attn.c_attn.weight           32x32  value " in said


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_tokenizer_is_the_checkpoint_s(tmp_path: Path, convert: Callable[..., tuple[int, str]], kind: str) -> None:
    """transformers reads every tokenizer in a Qwen2's folder as Qwen2's: another one's model does not leave as that."""
    from transformers import AutoTokenizer

    hugging_face_folder(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    save_foreign(tmp_path / "hf", kind.capitalize(), vocab_size=len(tokenizer))
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "ck")[0] == 0
    trained_with = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tmp_path / "tokenizer"}
    options = [word for name, value in trained_with.items() for word in ("--override", f"{name}={value}")]

    status, said = convert("megatron-to-hf", tmp_path / "ck", tmp_path / "out", "--verify", *options)
    written_as = json.loads((tmp_path / "out/config.json").read_text())["model_type"]
    assert status == 0 and written_as == ("sla_gpt" if kind == "qwen2" else kind), said
    assert ("sla-convert: not exported as qwen2, with the tokenizer that transformers " in said) == (kind == "qwen2")
    text = "Straße 1234\n\n  don't"
    found = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]

    status, said = convert("megatron-to-hf", tmp_path / "ck", tmp_path / "asked", "--as", kind, *options)
    assert status == (2 if kind == "qwen2" else 0)
    if kind == "qwen2":
        (line,) = [line for line in said.splitlines() if line.startswith("sla-convert")]
        assert "error: --as qwen2: with the tokenizer" in line and line.endswith(": expected sla_gpt")
        assert not (tmp_path / "asked").exists()


def test_a_wrong_export_is_found(
    tmp_path: Path, convert: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is not transposed, queries in the values' place, a field that is dropped: the logits differ."""
    from sla_megatron.commands.convert import to_foreign
    from sla_megatron.commands.convert.foreign import GPT2, Llama
    from sla_megatron.commands.convert.mapping import entries

    save_random_checkpoint(tmp_path / "gpt2", {"norm_epsilon": 1e-3})
    save_random_checkpoint(tmp_path / "llama", SWIGLU | {"rotary_base": 500})

    def square_as_it_is(self: Any, ours: str) -> bool:
        return ours.endswith("_proj.weight") and "o_proj" not in ours

    def backwards(config: Any) -> Any:
        return reversed(list(entries(config)))

    def without(kind: Any, *fields: str) -> Any:
        whole = kind.theirs
        return lambda self, ours: {name: value for name, value in whole(self, ours).items() if name not in fields}

    for name, kind, attribute, wrong in (
        ("gpt2", GPT2, "is_transposed", square_as_it_is),
        ("gpt2", to_foreign, "entries", backwards),
        ("gpt2", GPT2, "theirs", without(GPT2, "layer_norm_epsilon")),
        ("llama", Llama, "theirs", without(Llama, "rope_parameters", "rope_theta")),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(kind, attribute, wrong)
            words = ("megatron-to-hf", tmp_path / name, tmp_path / "out", "--verify", "--overwrite")
            status, said = convert(*words)
        assert status == 1 and "logits NOT equal" in said, (name, attribute, said)


@pytest.mark.parametrize("projection", ["full", "pruned"])
def test_dense_to_sla_keeps_the_weights(tmp_path: Path, projection: str) -> None:
    """The same weights, but for rows of keys and values that nobody reads; the settings are those asked for."""
    from sla_megatron.commands.convert.commands import hf_to_megatron, open_megatron
    from sla_megatron.commands.convert.dense_to_sla import WithSLA
    from sla_megatron.commands.convert.mapping import entries

    save_random_checkpoint(tmp_path / "dense", {"position_embedding_type": "rope"})
    dense = open_megatron(tmp_path / "dense")
    settings = {"sla_skip_distance": [2], "sla_num_skip_groups": 2, "sla_layers": "3-4"}
    source = WithSLA(dense, **settings, sla_kv_projection=projection)
    hf_to_megatron(source, tmp_path / "sla")
    found = open_megatron(tmp_path / "sla")
    assert found.args.sla and {name: getattr(found.args, name) for name in settings} == settings
    assert found.args.sla_kv_projection == projection
    smaller = []
    for entry in entries(found.config):
        tensor, original = found.get(entry.hf), dense.get(entry.hf)
        if tensor.shape != original.shape:
            smaller.append(entry.hf)
            # Groups 1 and 3 skip (NSNS); of layers 3 and 4 groups 0 and 2 are left, 8 rows each.
            original = torch.cat([original[0:8], original[16:24]])
        assert torch.equal(tensor, original), entry.hf
    kinds = [
        f"model.layers.{layer}.self_attn.{which}_proj.{what}"
        for layer in (2, 3)
        for which in "kv"
        for what in ("weight", "bias")
    ]
    assert sorted(smaller) == (sorted(kinds) if projection == "pruned" else [])
