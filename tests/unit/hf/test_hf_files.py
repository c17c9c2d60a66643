"""The Hugging Face configuration and the folders that save_pretrained writes."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import sla_megatron.hf
from sla_megatron.attention.sla_config import KINDS, SLAConfig
from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM, SlaGPTModel

from ..strategies import sla_configs
from .hf_models import build, relative_error, tiny, tokens

LONG = {
    **{"rope_type": "longrope", "original_max_position_embeddings": 32},
    **{"short_factor": [1.0, 2.0], "long_factor": [2.0, 3.0]},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# The restated mathematics.


def hf_config(sla: SLAConfig) -> SlaGPTConfig:
    return SlaGPTConfig(
        num_hidden_layers=sla.num_layers,
        num_attention_heads=2 * sla.num_query_groups,
        num_key_value_heads=sla.num_query_groups,
        head_dim=4,
        sla_skip_distances=list(sla.skip_distances),
        sla_skip_groups=list(sla.skip_groups),
        sla_layers=None if sla.layers is None else list(sla.layers),
        sla_kv_projection=sla.kv_projection,
        sla_share=sla.share,
        sla_source_layers=list(sla.source_layers),
    )


@given(sla_configs())
def test_the_configuration_means_what_sla_config_means(sla: SLAConfig) -> None:
    config = hf_config(sla)
    for layer in range(1, sla.num_layers + 1):
        groups = range(sla.num_query_groups)
        assert [config.source(layer, g) for g in groups] == [sla.source(layer, g) for g in groups]
        for kind in KINDS:
            assert [config.source_of(layer, g, kind) for g in groups] == [sla.source_of(layer, g, kind) for g in groups]
            found = [config.readers(layer, g, kind) for g in groups]
            assert found == [list(sla.readers(layer, g, kind)) for g in groups]
            assert config.live_groups(layer, kind) == list(sla.live_groups(layer, kind))
            assert config.projected_groups(layer, kind) == list(sla.projected_groups(layer, kind))
    assert config.live_groups(1, "key") == config.live_groups(1, "value") == list(range(sla.num_query_groups))
    kept = [[len(sla.live_groups(layer, kind)) for kind in KINDS] for layer in range(1, sla.num_layers + 1)]
    assert [mode == "reuse" for mode in config.kv_sharing_modes] == [max(counts) == 0 for counts in kept]
    assert [layer.num_key_value_heads for layer in config.per_layer_config] == [max(counts) for counts in kept]


@pytest.mark.parametrize("kind", KINDS)
@given(sla=sla_configs())
def test_whatever_a_layer_reads_of_another_is_one_slice_of_each_block_that_it_stores(kind: str, sla: SLAConfig) -> None:
    config = hf_config(sla)
    blocks = range(0, sla.num_query_groups, config.period)
    for layer in range(1, sla.num_layers + 1):
        assert sorted(config.stored_groups(layer, kind)) == config.live_groups(layer, kind)
        reads = config.reads_in_block(layer, kind)
        assert list(reads) == sorted(reads)
        in_all_blocks = {a: [start + g for start in blocks for g in groups] for a, groups in reads.items()}
        assert sorted(g for groups in in_all_blocks.values() for g in groups) == list(range(sla.num_query_groups))
        for source, groups in in_all_blocks.items():
            assert {config.source_of(layer, g, kind) for g in groups} == {source}
            stored = config.stored_groups(source, kind)
            width = len(stored) // len(blocks)
            for number, start in enumerate(blocks):
                block = stored[number * width : (number + 1) * width]
                first = block.index(start + reads[source][0])
                assert block[first : first + len(reads[source])] == [start + g for g in reads[source]]


@pytest.mark.parametrize(
    ("groups", "distances", "period"),
    [
        ([g for g in range(12) if g % 4], [9], 4),
        ([g for g in range(12) if g % 4], [3, 9], 12),
        ([1, 3, 5, 7, 9, 11], [3, 9], 4),
        ([3, 7, 11], [9], 4),
        (list(range(12)), [9], 1),
        ([], [9], 1),
        ([], [], 1),
        ([2], [9], 12),
    ],
)
def test_blocks(groups: list[int], distances: list[int], period: int) -> None:
    config = SlaGPTConfig(sla_skip_groups=groups, sla_skip_distances=distances)
    assert config.period == period


def test_the_paper_s_model_keeps_groups_in_their_order() -> None:
    config = SlaGPTConfig(sla_skip_groups=[g for g in range(12) if g % 4], sla_skip_distances=[9])
    for kind in KINDS:
        assert [config.stored_groups(layer, kind) for layer in (1, 3, 4)] == [list(range(12))] * 3
        assert config.stored_groups(12, kind) == [0, 4, 8]


def test_a_configuration_of_before_shares_both_by_distances() -> None:
    before = tiny().to_dict()
    for name in ("sla_share", "sla_source_layers"):
        del before[name]
    loaded = SlaGPTConfig.from_dict(before)
    assert (loaded.sla_share, loaded.sla_source_layers) == ("kv", [])
    assert [loaded.source_of(6, g, kind) for g in range(4) for kind in KINDS] == [6, 6, 4, 4, 2, 2, 4, 4]


# Values.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer; it is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of num_attention_heads, 8; it is 3"),
        ({"normalization": "BatchNorm"}, "normalization must be LayerNorm or RMSNorm; it is 'BatchNorm'"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type must be learned_absolute or rope"),
        ({"hidden_act": "swiglu"}, "hidden_act must be one of transformers' ACT2FN"),
        ({"norm_eps": 0.0}, "norm_eps must be a positive number"),
        ({"rotary_percent": 1.5}, r"rotary_percent must be a number in \(0, 1\]; it is 1.5"),
        ({"rotary_percent": 0.3}, "rotary_percent must be a share of head_dim=4 that is an even number"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number; it is -1.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters must be a dict with rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_parameters must be a dict with rope_type"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_parameters must be a dict with rope_type"),
        ({"rope_scaling": {"rope_type": "su"}}, "rope_parameters must be a dict with rope_type default, linear, dyn"),
        ({"rope_parameters": {"rope_type": "su"}}, "rope_parameters must be a dict with rope_type default, linear, d"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters must be a dict with rope_typ"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta must be a positive number; it is '1e4'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.3}}, "rotary_percent must be a share of head_dim=4"),
        (
            {"rope_scaling": LONG | {"long_factor": [1.0]}},
            "rope_parameters must be a dict whose long_factor is a list of 2 numbers; it is",
        ),
        ({"rope_scaling": LONG | {"short_factor": [1.0, "2"]}}, "rope_parameters must be a dict"),
        ({"rope_scaling": {**LLAMA3, "factor": -1}}, "rope_parameters must be a dict"),
        ({"rope_scaling": 2.0}, "rope_scaling must be None or a dict"),
        ({"rope_parameters": "yarn"}, "rope_parameters must be None or a dict; it is 'yarn'"),
        ({"sla_skip_distances": [0]}, r"sla_skip_distances must be integers >= 1; it is \[0\]"),
        ({"sla_skip_groups": [2, 1]}, r"sla_skip_groups must be ascending group indices within 0..3"),
        ({"sla_skip_groups": [4]}, "sla_skip_groups must be ascending group indices within 0..3"),
        ({"sla_layers": [5, 7]}, "sla_layers must be ascending layer numbers within 1..6"),
        ({"sla_layers": ["5"]}, "sla_layers must be ascending layer numbers within 1..6"),
        ({"sla_kv_projection": "some"}, "sla_kv_projection must be full or pruned"),
        ({"sla_share": "v"}, "sla_share must be kv or values or keys; it is 'v'"),
        ({"sla_source_layers": [1]}, r"sla_source_layers must be empty beside sla_skip_distances; it is \[1\]"),
        ({"sla_source_layers": [1, 7]}, r"sla_source_layers must be layer numbers within 1..6; it is \[1, 7\]"),
        ({"sla_source_layers": [0]}, "sla_source_layers must be layer numbers within 1..6"),
        ({"sla_source_layers": [True]}, "sla_source_layers must be layer numbers within 1..6"),
    ],
)
def test_bad_values_are_refused_in_one_line(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^SlaGPTConfig: {message}[^\n]*$"):
        tiny(**changes)
    # Set afterwards, they are refused on saving, if not before.
    config = tiny()
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=message):
        setattr(config, name, value)
        config.save_pretrained(tmp_path)


def test_defaults_follow_from_other_fields() -> None:
    config = SlaGPTConfig(hidden_size=96, num_attention_heads=6, attention_bias=False)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (6, 16, 384)
    assert config.attention_output_bias is False
    assert SlaGPTConfig(attention_bias=False, attention_output_bias=True).attention_output_bias is True
    assert tiny(sla_skip_distances=[4, 2]).sla_layers == [3, 4, 5, 6]
    assert tiny(sla_skip_distances=[]).sla_layers == []
    assert tiny(sla_skip_distances=[], sla_source_layers=[4, 3]).sla_layers == [4, 5, 6]


@pytest.mark.parametrize("rope_scaling", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3])
def test_the_configuration_survives_its_file(rope_scaling: dict | None, tmp_path: Path) -> None:
    config = tiny(
        rope_scaling=rope_scaling, rope_theta=5e5, rotary_percent=0.5, rotary_interleaved=True, eos_token_id=[3, 4],
        attention_output_bias=False, norm_zero_centered=True, sla_layers=[4, 6], sla_kv_projection="pruned",
        sla_share="values", sla_skip_distances=[], sla_source_layers=[3, 1],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    spec = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act max_position_embeddings normalization norm_eps position_embedding_type rope_theta rotary_percent "
        "attention_bias mlp_bias gated_mlp qk_layernorm tie_word_embeddings sla_skip_distances sla_skip_groups "
        "sla_layers sla_kv_projection sla_share sla_source_layers "
        "rope_scaling rotary_interleaved attention_output_bias norm_zero_centered"
    )
    loaded = SlaGPTConfig.from_pretrained(tmp_path)
    for name in spec.split():
        if name != "rope_scaling" or rope_scaling is not None:
            assert written[name] == getattr(config, name), name
        assert getattr(loaded, name) == getattr(config, name), name
    assert written["model_type"] == "sla_gpt"
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


# Folders.


def expected_names(config: SlaGPTConfig) -> set[str]:
    """The tensor names of the export format."""
    kinds = ["weight", "bias"] if config.normalization == "LayerNorm" else ["weight"]
    names = {"model.embed_tokens.weight"} | {f"model.norm.{kind}" for kind in kinds}
    if config.position_embedding_type == "learned_absolute":
        names.add("model.embed_positions.weight")
    if not config.tie_word_embeddings:
        names.add("lm_head.weight")
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        projections = ["q_proj", *(f"{kind[0]}_proj" for kind in KINDS if config.projected_groups(i + 1, kind))]
        linears = {f"self_attn.{name}": config.attention_bias for name in projections}
        linears["self_attn.o_proj"] = config.attention_output_bias
        linears |= {f"mlp.{name}": config.mlp_bias for name in ("up_proj", "down_proj")}
        if config.gated_mlp:
            linears["mlp.gate_proj"] = config.mlp_bias
        for name, bias in linears.items():
            names |= {f"{layer}{name}.weight"} | ({f"{layer}{name}.bias"} if bias else set())
        norms = ["input_layernorm", "post_attention_layernorm"]
        if config.qk_layernorm:
            norms += [f"self_attn.{x[0]}_norm" for x in projections if x != "v_proj"]
        names |= {f"{layer}{norm}.{kind}" for norm in norms for kind in kinds}
    return names


SHAPES: list[dict[str, Any]] = [
    {"position_embedding_type": "learned_absolute"},
    {"sla_kv_projection": "pruned", "qk_layernorm": True, "tie_word_embeddings": False, "normalization": "RMSNorm"},
    {"sla_kv_projection": "pruned", "sla_skip_distances": [3], "sla_skip_groups": [0, 1, 2, 3], "qk_layernorm": True},
    {"gated_mlp": True, "attention_bias": False, "attention_output_bias": True, "mlp_bias": False},
    # Values without keys, and keys without values.
    {
        **{"sla_kv_projection": "pruned", "sla_share": "keys", "qk_layernorm": True},
        **{"sla_skip_distances": [], "sla_source_layers": [2], "sla_skip_groups": [0, 1, 2, 3]},
    },
    {"sla_kv_projection": "pruned", "sla_share": "values", "sla_skip_distances": [3], "sla_skip_groups": [0, 1, 2, 3]},
]


@pytest.mark.parametrize("index", range(len(SHAPES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_loaded_bit_for_bit(index: int, dtype: torch.dtype, tmp_path: Path) -> None:
    config = tiny(**SHAPES[index])
    model = build(config, dtype=dtype)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == expected_names(config)
        for i in range(6):
            for kind in KINDS:
                name = f"model.layers.{i}.self_attn.{kind[0]}_proj.weight"
                rows = stored.get_slice(name).get_shape()[0] if name in stored.keys() else 0
                assert rows == len(config.projected_groups(i + 1, kind)) * config.head_dim

    loaded, report = SlaGPTForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == dtype
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        assert loaded(tokens()).logits.equal(model(tokens()).logits)
        assert SlaGPTModel.from_pretrained(tmp_path, dtype="auto")(tokens()).last_hidden_state.equal(
            model.model(tokens()).last_hidden_state
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_are_fp32_however_a_model_came_by_its_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers' own frequencies; loading makes a model without memory first, which leaves buffers empty."""
    kind = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    theirs = LlamaConfig(hidden_size=32, num_attention_heads=8, rope_parameters=kind | {"rope_theta": 1e4})
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    model = build(tiny(rope_scaling=kind), dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = SlaGPTForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for each in (model, loaded, copy.deepcopy(loaded), loaded.double().half().to(dtype), model.to("meta")):
        found = each.model.rotary_emb.inv_freq
        assert found.dtype == torch.float32 and not any("freq" in name for name in each.state_dict())
        assert found.is_meta or found.equal(expected)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_weights_that_a_folder_lacks_are_initialised(zero_centered: bool, tmp_path: Path) -> None:
    """Loading makes the model without memory and fills it: what is not in the file too."""
    model = build(tiny(norm_zero_centered=zero_centered), dtype=torch.float32)
    state = {name: tensor for name, tensor in model.state_dict().items() if "norm" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, report = SlaGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(report["missing_keys"]) == 2 * (2 * 6 + 1)
    for name, tensor in loaded.named_parameters():
        if "norm" in name:
            assert (tensor == (1 if name.endswith("weight") and not zero_centered else 0)).all(), name
        else:
            assert tensor.equal(model.state_dict()[name]), name


@pytest.fixture
def remote_code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remote code is copied to and imported from a folder of the test."""
    cache = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "transformers_modules"}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("copied_by", ["save_pretrained", "an exporter"])
@pytest.mark.usefixtures("remote_code_cache")
def test_a_folder_is_loaded_with_the_code_that_it_holds(copied_by: str, tmp_path: Path) -> None:
    model, folder = build(tiny(**SHAPES[2]), dtype=torch.float32), tmp_path / "exported"
    model.save_pretrained(folder)
    code = sorted(path.name for path in Path(sla_megatron.hf.__file__).parent.glob("*_sla_gpt.py"))
    assert sorted(path.name for path in folder.glob("*.py")) == code
    if copied_by == "an exporter":
        for name in code:
            (folder / name).unlink()
            shutil.copy(Path(sla_megatron.hf.__file__).with_name(name), folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == ["SlaGPTForCausalLM"]
    assert written["auto_map"] == {
        "AutoConfig": "configuration_sla_gpt.SlaGPTConfig",
        "AutoModelForCausalLM": "modeling_sla_gpt.SlaGPTForCausalLM",
    }

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for each in (config, loaded):
        assert type(each).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        assert loaded(tokens()).logits.equal(model(tokens()).logits)
    assert loaded.generate(tokens(), max_new_tokens=3, pad_token_id=0).shape == (2, 14)
    # What was loaded so can be saved and loaded so again.
    loaded.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").glob("*.py")) == code
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(folder, trust_remote_code=False)


def test_the_code_of_a_folder_needs_torch_and_transformers_only() -> None:
    for path in Path(sla_megatron.hf.__file__).parent.glob("*_sla_gpt.py"):
        imported = re.findall(r"^\s*(?:from|import) (\.?\w*)", path.read_text(), re.MULTILINE)
        others = {name.split(".")[0] for name in imported if name[0] != "."} - set(sys.stdlib_module_names)
        assert others <= {"torch", "transformers"}, (path, others)
        assert all(re.fullmatch(r"\.\w+_sla_gpt", name) for name in imported if name[0] == ".")


@pytest.mark.skipif(not transformers.utils.is_accelerate_available(), reason="needs accelerate")
def test_layers_spread_over_devices(tmp_path: Path) -> None:
    """On the CPU and on disk: accelerate's hooks run around each layer."""
    model = build(tiny(tie_word_embeddings=False), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    where = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(6)}
    where |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    spread = SlaGPTForCausalLM.from_pretrained(tmp_path / "model", device_map=where, offload_folder=tmp_path / "disk")
    assert hasattr(spread.model.layers[1], "_hf_hook")
    with torch.no_grad():
        assert relative_error(spread(tokens()).logits, model(tokens()).logits) <= 1e-6
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert spread.generate(tokens(), **how).equal(model.generate(tokens(), **how))
    automatic = SlaGPTForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    with torch.no_grad():
        assert automatic(tokens()).logits.equal(model(tokens()).logits)
