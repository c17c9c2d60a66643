"""``sla-convert`` on hybrid models: exported as the GPT that they are, made of a GPT and turned back, or refused."""

from __future__ import annotations

import filecmp
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sla_megatron.commands.convert import checkpoint_arguments, commands, megatron_reader, stored_keys
from sla_megatron.commands.convert.architecture import config_from_args
from sla_megatron.commands.convert.errors import ConvertError
from sla_megatron.commands.convert.stored_arguments import completed
from sla_megatron.commands.convert.verify import THRESHOLD, compare
from sla_megatron.common.layer_pairs import LayerPairs
from tests.support.argument_rows import SWIGLU
from tests.support.convert_models import save_random_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

#: GPTs of four layers, and the pattern that is the same.  Every parameter is drawn in order of depth, so that both are
#: the same weights though Megatron builds and saves each by itself.
FULL = SWIGLU | {"sla": True, "sla_skip_distance": [1, 2], "sla_num_skip_groups": 2, "qk_layernorm": True}
SKIPV1 = {
    "sla": True,
    "qk_layernorm": True,
    "sla_source_layer": [1],
    "sla_share": "values",
    "sla_kv_projection": "pruned",
}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "full": (FULL, "*-*-*-*-"),
    # Numbered layers, biases, learned positions.
    "pruned": ({"sla": True, "sla_skip_distance": [1], "sla_kv_projection": "pruned"}, "*-*-*-*-"),
    # Values of the first layer; of others, some groups have a key alone.
    "values": (SWIGLU | SKIPV1, "*-*-*-*-"),
    "experts": (SWIGLU | {"num_experts": 2}, "*E*E*E*E"),
    # Numbered too.
    "mixed": (SWIGLU | {"num_experts": 2, "moe_layer_freq": "([1,0,1,0])"}, "*E*-*E*-"),
}
#: What training had in stages is stored so, and the layers that Megatron's manual names on the command line.
STAGES = "*-|*-*-|*-"
SPEC = ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<name>/gpt`` and ``<name>/hybrid``, as Megatron's trainer saves them."""
    folder = tmp_path_factory.mktemp("made")
    for name, (flags, pattern) in MODELS.items():
        save_random_checkpoint(folder / name / "gpt", flags)
        hybrid = {flag: value for flag, value in flags.items() if flag != "moe_layer_freq"}
        stored = {"hybrid_layer_pattern": STAGES, "spec": SPEC} if name == "full" else None
        save_random_checkpoint(folder / name / "hybrid", hybrid | {"hybrid_layer_pattern": pattern}, stored=stored)
    return folder


@pytest.mark.parametrize("name", ["full", "pruned", "values"])
def test_exported_as_the_gpt(made: Path, tmp_path: Path, name: str) -> None:
    """Byte for byte the GPT's files; and Megatron's hybrid model has the export's logits."""
    for what in ("gpt", "hybrid"):
        commands.megatron_to_hf(commands.open_megatron(made / name / what), tmp_path / what)
    files, theirs = (
        sorted(str(path.relative_to(tmp_path / what)) for path in (tmp_path / what).rglob("*") if path.is_file())
        for what in ("gpt", "hybrid")
    )
    assert files == theirs
    assert filecmp.cmpfiles(tmp_path / "gpt", tmp_path / "hybrid", files, shallow=False)[1:] == ([], [])
    assert compare(commands.open_megatron(made / name / "hybrid"), tmp_path / "hybrid").relative <= THRESHOLD


def _stored(path: Path) -> dict[str, Any]:
    """All that a checkpoint stores of the model: tensors, and the names of what else there is."""
    from torch.distributed.checkpoint import FileSystemReader, load

    folder = megatron_reader.checkpoint_folder(path)
    tensors = megatron_reader.stored_tensors(folder)
    state = {key: torch.empty(stored.size, dtype=stored.properties.dtype) for key, stored in tensors.items()}
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return dict.fromkeys(megatron_reader.stored_metadata(folder)) | state


def _differ(found: Path, expected: Path) -> list[str]:
    ours, theirs = _stored(found), _stored(expected)
    assert sorted(ours) == sorted(theirs)
    return [key for key, tensor in theirs.items() if tensor is not None and not torch.equal(ours[key], tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_made_of_the_other_kind(made: Path, tmp_path: Path, convert: Callable[..., tuple[int, str]], name: str) -> None:
    """What is made of the GPT is what Megatron stores of the hybrid model, and the reverse: names and bits."""
    flags, pattern = MODELS[name]
    words = ("gpt-to-hybrid", made / name / "gpt", tmp_path / "hybrid", "--hybrid-layer-pattern", pattern)
    assert convert(*words)[0] == convert("hybrid-to-gpt", made / name / "hybrid", tmp_path / "gpt")[0] == 0
    for what in ("gpt", "hybrid"):
        assert _differ(tmp_path / what, made / name / what) == []
        args, native = (
            checkpoint_arguments.stored_args(megatron_reader.checkpoint_folder(folder / what))
            for folder in (tmp_path, made / name)
        )
        assert (args.num_layers, args.moe_layer_freq) == (native.num_layers, native.moe_layer_freq)
        assert (args.iteration, args.no_save_optim) == (0, True)
        assert bool(args.hybrid_layer_pattern) == (what == "hybrid")


class _Exchanged(LayerPairs):
    """The last two layers' MLPs are taken for each other's."""

    @classmethod
    def of(cls, pattern: str) -> LayerPairs:
        right = LayerPairs.of(pattern)
        return replace(right, mlp=(*right.mlp[:-2], *right.mlp[:-3:-1]))


def test_wrong_pairs_are_caught(
    made: Path, tmp_path: Path, convert: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exporter, and a maker of hybrid checkpoints, that pair by the wrong index: logits and bits show it."""
    monkeypatch.setattr(stored_keys, "LayerPairs", _Exchanged)
    status, printed = convert("megatron-to-hf", made / "full" / "hybrid", tmp_path / "hf", "--verify")
    assert (status, "logits NOT equal" in printed) == (1, True)
    monkeypatch.setattr("sla_megatron.commands.convert.other_kind.LayerPairs", _Exchanged)
    words = ("gpt-to-hybrid", made / "full" / "gpt", tmp_path / "hybrid", "--hybrid-layer-pattern", "*-*-*-*-")
    assert convert(*words)[0] == 0
    assert _differ(tmp_path / "hybrid", made / "full" / "hybrid") != []


def test_sla_of_a_dense_hybrid_model(tmp_path: Path, convert: Callable[..., tuple[int, str]]) -> None:
    """It stays hybrid, with the same weights; and is described by its own names."""
    save_random_checkpoint(tmp_path / "dense", SWIGLU | {"hybrid_layer_pattern": "*-*-"}, stored={"load": "elsewhere"})
    assert convert("dense-to-sla", tmp_path / "dense", tmp_path / "sla", "--sla-skip-distance", "1")[0] == 0
    assert _differ(tmp_path / "sla", tmp_path / "dense") == []
    status, printed = convert("describe", tmp_path / "sla")
    assert (status, "num_hidden_layers: 2" in printed) == (0, True)
    assert "layers.1.mlp.down_proj.weight" in printed and "decoder.layers.3.mlp.linear_fc2.weight\n" in printed


#: Of a hybrid model's stored arguments, and why it is not exported.
NOT_EXPORTED = {
    "other-order": ({"hybrid_layer_pattern": "**--"}, r"\*\*--: layers do not pair up: .* as \*-\*-"),
    "mlp-first": ({"hybrid_layer_pattern": "-*-*"}, r"-\*-\*: layers do not pair up"),
    "lone-attention": ({"hybrid_layer_pattern": "*-*"}, r"\*-\*: layers do not pair up"),
    "mamba": ({"hybrid_layer_pattern": "M*-"}, r"M\*-: the Hugging Face format has no Mamba layers \(M\)"),
    "older-name": ({"hybrid_override_pattern": "M*-"}, "no Mamba layers"),
    "delta-net": ({"hybrid_layer_pattern": "G-*-"}, "has no gated delta nets"),
    "sparse": ({"hybrid_layer_pattern": "D-"}, "has no sparse attention"),
    "latent": ({"hybrid_layer_pattern": "+-"}, "has no latent attention"),
    "experts": ({"hybrid_layer_pattern": "*E"}, "has no experts"),
    "further": ({"hybrid_layer_pattern": "*-/*-"}, "has no layers that predict further tokens"),
    "rope-scaling": ({"hybrid_layer_pattern": "*-", "use_rope_scaling": True}, "hybrid models do not compute with it"),
    "interleaved": ({"hybrid_layer_pattern": "*-", "rotary_interleaved": True}, "hybrid models do not compute with it"),
}


@pytest.mark.parametrize("name", NOT_EXPORTED)
def test_not_exported(name: str) -> None:
    stored, line = NOT_EXPORTED[name]
    with pytest.raises(ConvertError, match=line):
        config_from_args(completed(Namespace(**stored)), 100)


#: Words after ``sla-convert``, of folders of :func:`made`, and the line that says why not.
NOT_MADE = {
    "gpt-of-gpt": (("hybrid-to-gpt", "full/gpt"), "a GPT's checkpoint: expected a hybrid model's"),
    "hybrid-of-hybrid": (
        ("gpt-to-hybrid", "full/hybrid", "*-*-*-*-"),
        f"a hybrid model's checkpoint ({STAGES}): expected a GPT's",
    ),
    "fewer-layers": (
        ("gpt-to-hybrid", "full/gpt", "*-*-"),
        "*-*-: expected an attention layer (*) and an MLP (-, E) for each",
    ),
    "experts": (("gpt-to-hybrid", "mixed/gpt", "*E*E*E*E"), "for each of E-E-, those of"),
    "mamba": (("gpt-to-hybrid", "full/gpt", "*-*-*-*-M"), "a GPT has no Mamba layers (M)"),
    "unpaired": (("gpt-to-hybrid", "full/gpt", "*-*-*-*"), "has 4 and 3"),
}


@pytest.mark.parametrize("name", NOT_MADE)
def test_not_made(made: Path, tmp_path: Path, convert: Callable[..., tuple[int, str]], name: str) -> None:
    (command, source, *pattern), line = NOT_MADE[name]
    options = ("--hybrid-layer-pattern", *pattern) if pattern else ()
    status, printed = convert(command, made / source, tmp_path / "out", *options)
    (said,) = [text for text in printed.splitlines() if text.startswith("sla-convert: error")]
    assert (status, line in said, list(tmp_path.iterdir())) == (2, True, []), said
