"""Checkpoints with one unusual argument each are exported to an equal model or refused by name; ``--verify`` sees what
an export drops."""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sla_megatron.commands.convert import cli, commands, megatron_reader
from sla_megatron.commands.convert.errors import ConvertError
from sla_megatron.commands.convert.harmless_arguments import HARMLESS as HARMLESS_ROWS
from sla_megatron.commands.convert.hf_reader import HFSource
from sla_megatron.commands.convert.megatron_model import megatron_alone
from sla_megatron.commands.convert.model_arguments import ONLY_WITH
from sla_megatron.commands.convert.stored_arguments import megatron_defaults, names
from sla_megatron.commands.convert.trained_model import HERE, trained_model
from sla_megatron.commands.convert.verify import THRESHOLD, compare
from tests.support.argument_rows import (
    EXACT_GELU,
    HARMLESS,
    LLAMA3,
    MAPPED,
    REFUSED,
    REFUSED_AS_STORED,
    ROPE,
    SWIGLU,
    Row,
)
from tests.support.convert_models import VOCABULARY, save_random_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Row], Path]:
    """The checkpoint of a row, made once; nothing writes into it."""
    made: dict[str, Path] = {}

    def make(row: Row) -> Path:
        key = f"{row.flags} {row.stored}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("megatron")
            save_random_checkpoint(made[key], row.flags, stored=row.stored)
        return made[key]

    return make


@pytest.fixture
def export(
    checkpoint: Callable[[Row], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str]]:
    """``sla-convert megatron-to-hf ... --verify`` of a row's checkpoint: exit status, and the line that says why."""

    def run(row: Row, *options: str) -> tuple[int, str]:
        folder = checkpoint(row)
        capsys.readouterr()
        command = ["sla-convert", "megatron-to-hf", str(folder), str(tmp_path / "hf"), "--verify"]
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        said = printed.out + printed.err
        lines = [line for line in said.splitlines() if line.startswith("sla-convert") or " logits " in line]
        return ended.value.code, lines[-1]

    return run


ACCEPTED = MAPPED | HARMLESS


@pytest.mark.parametrize("name", ACCEPTED)
def test_exported_and_equal(export: Callable[..., tuple[int, str]], name: str) -> None:
    status, line = export(ACCEPTED[name])
    assert (status, "logits equal" in line) == (0, True), line


TURNED_DOWN = REFUSED | REFUSED_AS_STORED


@pytest.mark.parametrize("name", TURNED_DOWN)
def test_refused_by_name(export: Callable[..., tuple[int, str]], tmp_path: Path, name: str) -> None:
    status, line = export(TURNED_DOWN[name])
    assert status == 2
    assert re.search(TURNED_DOWN[name].refused, line), line
    assert list(tmp_path.iterdir()) == []


def test_overrides_say_what_is_the_case(export: Callable[..., tuple[int, str]]) -> None:
    """A factor that Megatron ignored, an argument of a patch that changes nothing; and a name that nobody has."""
    row = Row(REFUSED["rope-scaling-factor"].flags, {"my_note": "try 3"})
    unknown = export(row, "--override", "my_notes=None")
    assert unknown[0] == 2 and "my_notes: neither Megatron nor the checkpoint has" in unknown[1]
    status, line = export(row, "--override", "rope_scaling_factor=8.0", "--override", "my_note=None")
    assert (status, "logits equal" in line) == (0, True), line


@pytest.mark.parametrize("name", REFUSED)
def test_an_exporter_without_refusals_is_caught(
    export: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The same models, exported by one that refuses nothing: the logits differ, or the weights do not fit."""
    row, config_from_args = REFUSED[name], megatron_reader.config_from_args
    monkeypatch.setattr(megatron_reader, "require_understood", lambda args: None)
    monkeypatch.setattr(
        megatron_reader,
        "config_from_args",
        lambda args, size: config_from_args(Namespace(**{**vars(args), **row.taken}), size),
    )
    status, line = export(row)
    assert (status, row.caught in line) == (1 if "logits" in row.caught else 2, True), line


def _config(**changed: Any) -> Callable[..., dict[str, Any]]:
    """``config_from_args`` of an exporter that takes these fields for what they usually are."""
    config_from_args = megatron_reader.config_from_args

    def broken(args: Any, size: int) -> Mapping[str, Any]:
        return config_from_args(args, size) | changed

    return broken


#: A model, and the fields that the exporter drops.
DROPPED = {
    "norm_eps": (Row({"norm_epsilon": 1e-2}), {"norm_eps": 1e-5}),
    "qk-norm_eps": (Row(ROPE | {"qk_layernorm": True, "norm_epsilon": 1e-2}), {"norm_eps": 1e-5}),
    "norm_zero_centered": (Row({"apply_layernorm_1p": True}), {"norm_zero_centered": False}),
    "rope_theta": (Row(ROPE), {"rope_theta": 10000.0}),
    "rotary_percent": (Row(ROPE | {"rotary_percent": 0.5}), {"rotary_percent": 1.0}),
    "rotary_interleaved": (Row(ROPE | {"rotary_interleaved": True}), {"rotary_interleaved": False}),
    "rope_scaling": (Row(LLAMA3), {"rope_scaling": None}),
    "rope_scaling-linear": (Row(ROPE | {"rotary_seq_len_interpolation_factor": 4}), {"rope_scaling": None}),
    "hidden_act": (Row(EXACT_GELU), {"hidden_act": "gelu_pytorch_tanh"}),
    "hidden_act-fused": (Row(), {"hidden_act": "gelu"}),
    "hidden_act-squared": (Row(EXACT_GELU | {"squared_relu": True}), {"hidden_act": "relu"}),
    "sla_skip_distances": (
        Row(SWIGLU | {"sla": True, "sla_skip_distance": [1]}),
        {"sla_skip_distances": [2], "sla_layers": [3, 4]},
    ),
    "sla_share": (Row(SWIGLU | {"sla": True, "sla_share": "values"}), {"sla_share": "kv"}),
    "sla_source_layers": (
        Row(SWIGLU | {"sla": True, "sla_source_layer": [2]}),
        {"sla_source_layers": [], "sla_skip_distances": [1], "sla_layers": [3, 4]},
    ),
    "sla": (
        Row(SWIGLU | {"sla": True, "sla_skip_distance": [1]}),
        {"sla_skip_distances": [], "sla_skip_groups": [], "sla_layers": []},
    ),
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_dropped_field_is_caught(
    export: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    row, changed = DROPPED[name]
    monkeypatch.setattr(megatron_reader, "config_from_args", _config(**changed))
    status, line = export(row)
    assert (status, "logits NOT equal" in line) == (1, True), line


def test_a_factor_taken_for_megatrons_is_caught(
    export: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was trained with --rope-scaling-factor 32, exported with 8."""
    row = MAPPED["rope-scaling-factor-honoured"]
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    monkeypatch.setattr(megatron_reader, "config_from_args", _config(rope_scaling=scaling))
    assert export(row)[0] == 1


def test_rows_read_in_another_order_are_caught(
    export: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the comparison do not come by the exporter's reader: queries of the wrong heads show."""
    qkv_rows = megatron_reader.qkv_rows
    monkeypatch.setattr(
        megatron_reader,
        "qkv_rows",
        lambda config, layer: {part: rows[::-1] for part, rows in qkv_rows(config, layer).items()},
    )
    # The way back has the right order, and must not be what the comparison goes by.
    assert export(Row(ROPE))[0] == 1


def test_what_a_cpu_cannot_build_is_not_called_equal(
    export: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of queries and keys that Megatron's layers of torch leave out in silence."""
    monkeypatch.setattr(megatron_reader, "require_understood", lambda args: None)
    status, line = export(REFUSED_AS_STORED["qk-l2-norm"])
    assert status == 2 and "--qk-l2-norm cannot be computed here" in line


def test_kernels_that_a_job_chose(export: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell's variable for Transformer Engine, which Megatron would take for a contradiction, is nothing here."""
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    status, line = export(Row(ROPE))
    assert (status, "logits equal" in line) == (0, True), line
    assert os.environ["NVTE_FUSED_ATTN"] == "0"


#: Values of arguments that are one word of several.
OTHER_WORDS = {
    "tp_comm_bootstrap_backend": "gloo",
    "fp8_recipe": "mxfp8",
    "fp8_amax_compute_algo": "max",
    "fp4_recipe": "custom",
    "cross_entropy_fusion_impl": "te",
    "kitchen_attention_backend": "fa",
    "inference_grouped_gemm_backend": "torch",
    "inference_moe_token_dispatcher_type": "nccl",
    "moe_router_score_function": "sigmoid",
    "moe_router_load_balancing_type": "sinkhorn",
    "moe_token_dispatcher_type": "alltoall",
    "moe_flex_dispatcher_backend": "hybridep",
    "moe_token_drop_policy": "position",
    "dsa_kernel_backend": "none",
}

#: Of experts that there are none of: Megatron has something against them alone, or stores layers otherwise.
NOT_ALONE = {
    *("moe_ffn_hidden_size", "moe_router_padding_for_quantization", "moe_router_padding_for_fp8"),
    *("moe_router_group_topk", "moe_router_enable_expert_bias", "moe_single_grouped_weight", "moe_single_grouped_bias"),
    *("moe_enable_deepep", "moe_pad_expert_input_to_capacity", "moe_permute_fusion", "moe_paged_stash"),
    *("moe_expert_rank_capacity_factor", "moe_layer_freq"),
}


def test_what_is_called_harmless_is(checkpoint: Callable[[Row], Path]) -> None:
    """Megatron's model with another value of each argument that is called harmless and that its configuration has, and
    that the comparison does not set itself: the same logits, bit for bit."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig

    source = commands.open_megatron(checkpoint(Row(ROPE | {"num_layers": 1})))
    read = {field.name for config in (TransformerConfig, GPTModelConfig) for field in fields(config)}
    listed = {name for row in (*HARMLESS_ROWS.values(), *ONLY_WITH.values()) for name in names(row)}
    tokens = torch.arange(24)[None]
    usual, changed, refused = vars(source.args), [], set()
    with megatron_alone(), torch.no_grad():
        expected = trained_model(source)(tokens, tokens, None)
        for name in sorted(read & listed & set(megatron_defaults()) - {*HERE, "attention_backend"}):
            source.args = Namespace(**{**usual, name: _another(name, usual[name])})
            try:
                changed += [] if torch.equal(trained_model(source)(tokens, tokens, None), expected) else [name]
            except ConvertError:
                refused.add(name)
    assert (changed, refused) == ([], NOT_ALONE)


def _another(name: str, value: Any) -> Any:
    if name in OTHER_WORDS:
        return OTHER_WORDS[name]
    return not value if isinstance(value, bool) else (value or 0) + 1


def test_rope_scaling_of_llama_3_2(tmp_path: Path) -> None:
    """A factor of 32 on both ways; the checkpoint says that its model has it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=100,
        max_position_embeddings=200,
        initializer_range=0.3,
        rope_theta=500000.0,
        rope_scaling=rope,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    commands.hf_to_megatron(HFSource(tmp_path / "llama"), tmp_path / "megatron")
    found = commands.open_megatron(tmp_path / "megatron")
    assert (found.args.rope_scaling_factor, found.args.rope_scaling_factor_honoured) == (32.0, True)
    assert found.config["rope_scaling"]["factor"] == 32.0
    assert compare(found, tmp_path / "llama").relative <= THRESHOLD
    commands.megatron_to_hf(found, tmp_path / "exported")
    assert compare(found, tmp_path / "exported").relative <= THRESHOLD
    # Megatron's 8 would be another model.
    found.args.rope_scaling_factor = 8.0
    assert compare(found, tmp_path / "llama").relative > 100 * THRESHOLD


def test_rows_beyond_the_tokens_are_padding(tmp_path: Path) -> None:
    """A folder of more rows than there are tokens is equal; one of fewer lacks tokens that were trained."""
    save_random_checkpoint(tmp_path / "megatron", {"num_layers": 1})
    source = commands.open_megatron(tmp_path / "megatron")
    commands.megatron_to_hf(source, tmp_path / "hf", kind="sla_gpt")
    config, weights = tmp_path / "hf" / "config.json", tmp_path / "hf" / "model.safetensors"
    tensors = load_file(weights)
    embeddings = tensors["model.embed_tokens.weight"]
    for rows in (VOCABULARY + 20, VOCABULARY - 20):
        filled = torch.ones(rows, embeddings.shape[1])
        filled[: len(embeddings)] = embeddings[:rows]
        save_file(tensors | {"model.embed_tokens.weight": filled}, weights, metadata={"format": "pt"})
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": rows}))
        if rows > VOCABULARY:
            assert compare(source, tmp_path / "hf").relative <= THRESHOLD
    with pytest.raises(ConvertError, match="a vocabulary of 80; the checkpoint has weights for 100 tokens"):
        compare(source, tmp_path / "hf")
