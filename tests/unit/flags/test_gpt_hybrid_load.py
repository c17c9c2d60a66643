"""Loading across kinds of models: which layers are each other's, what is asked of a checkpoint, what is refused."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from sla_megatron.common.errors import FlagError
from sla_megatron.common.layer_pairs import LayerPairs
from sla_megatron.flags import gpt_hybrid_load
from sla_megatron.flags.gpt_hybrid_load import Across, load_across_kinds

pytestmark = pytest.mark.filterwarnings("ignore")

interop = pytest.importorskip("megatron.core.dist_checkpointing.gpt_checkpoint_interop")


def test_the_layers_that_upstream_pairs() -> None:
    """All patterns of up to five symbols: the same pairs, and none where upstream finds none, but for mixed MLPs."""
    mixed = 0
    for pattern in ("".join(symbols) for length in range(6) for symbols in product("*-EM|", repeat=length)):
        try:
            ours = LayerPairs.of(pattern)
        except ValueError:
            ours = None
        if {"-", "E"} <= set(pattern):
            # GPTs that --moe-layer-freq gives both have numbered layers, which upstream does not read.
            mixed += ours is not None
            continue
        try:
            theirs = interop.gpt_compatible_layer_maps(pattern)
        except ValueError:
            assert ours is None, pattern
            continue
        assert {layer: index for index, layer in enumerate(ours.attention)} == theirs.attention_to_gpt
        assert {layer: index for index, layer in enumerate(ours.mlp)} == theirs.mlp_to_gpt
        assert set(ours.alone) == theirs.fresh_init
    assert mixed > 10


@pytest.mark.parametrize(
    ("pattern", "alternate"),
    [("*-*-", True), ("*E|*E", True), ("*-*E", True), ("**--", False), ("-*-*", False), ("*-M", False)],
)
def test_where_attention_and_mlp_alternate(pattern: str, alternate: bool) -> None:
    assert LayerPairs.of(pattern).alternate is alternate


#: What the tests take for a model: two pairs, the second's MLP last.
PAIRS = LayerPairs.of("*-|**--")


def _hybrid_state(pairs: LayerPairs) -> dict[str, Any]:
    """As a hybrid model's rank 1 of 2 stores it, made by Megatron's own functions.

    A tensor that is split, an object, experts with an axis of their own, a gated matrix, and an optimizer's state.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    def split(key: str, *offsets: tuple[int, int, int]) -> Any:
        axis = len(offsets)
        return ShardedTensor.from_rank_offsets(key, torch.ones(4, 3), *offsets, (axis, 1, 2), prepend_axis_num=axis)

    state: dict[str, Any] = {
        "norm": ShardedTensor.from_rank_offsets("decoder.final_norm.weight", torch.ones(3)),
        "embedding": split("embedding.word_embeddings.weight"),
    }
    for index in pairs.attention:
        layer = f"decoder.layers.{index}.self_attention"
        state[f"{index}.qkv"] = split(f"{layer}.linear_qkv.weight")
        state[f"{index}.adam"] = split(f"optimizer.state.exp_avg.{layer}.linear_qkv.weight")
        state[f"{index}.extra"] = ShardedObject(f"{layer}.linear_proj._extra_state", None, (1,), (0,))
    for index in pairs.mlp:
        layer = f"decoder.layers.{index}.mlp"
        state[f"{index}.fc1"] = apply_swiglu_sharded_factory(split(f"{layer}.linear_fc1.weight"), ())
        state[f"{index}.experts"] = split(f"{layer}.experts.experts.linear_fc2.weight", (0, 1, 2))
        state[f"{index}.extra"] = ShardedObject(f"{layer}.experts.experts._extra_state", None, (2,), (1,))
    return state


def _places(state: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What a checkpoint is asked for, entry by entry."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    built = dict(state)
    apply_factories(built)
    names = ("key", "global_shape", "global_offset", "axis_fragmentations", "prepend_axis_num")
    return [tuple(getattr(entry, name, None) for name in names) for entry in nested_values(built)]


def _as_gpt(pattern: str, pairs: LayerPairs) -> dict[str, Any]:
    """What upstream makes of the hybrid model's entries for a GPT's checkpoint of one tensor for all layers."""
    state = _hybrid_state(pairs)
    interop.retarget_sharded_state_dict_to_gpt_checkpoint(state, interop.gpt_compatible_layer_maps(pattern))
    return state


def test_a_gpt_asks_for_the_hybrid_models_tensors() -> None:
    """Layers that are one tensor: the reverse of what upstream does on the other way."""
    state = _as_gpt("*-|**--", PAIRS)
    assert _places(state) != _places(_hybrid_state(PAIRS))
    Across(PAIRS, into_hybrid=False).retarget(state)
    assert _places(state) == _places(_hybrid_state(PAIRS))


def test_wrong_pairs_are_seen() -> None:
    """With the MLPs of the last two layers exchanged it asks for other tensors."""
    wrong = replace(PAIRS, mlp=(*PAIRS.mlp[:1], *PAIRS.mlp[:0:-1]))
    state = _as_gpt("*-|**--", PAIRS)
    Across(wrong, into_hybrid=False).retarget(state)
    assert _places(state) != _places(_hybrid_state(PAIRS))


def test_numbered_layers() -> None:
    """Both ways: names alone change, and each layer's is that of its pair."""
    gpts = {
        "decoder.final_norm.weight": "decoder.final_layernorm.weight",
        "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
        **{
            f"decoder.layers.{a}.self_attention.": f"decoder.layers.{i}.self_attention."
            for i, a in enumerate((0, 2, 3))
        },
        **{f"decoder.layers.{m}.mlp.": f"decoder.layers.{i}.mlp." for i, m in enumerate((1, 4, 5))},
    }
    hybrid = _places(_hybrid_state(PAIRS))
    state = _hybrid_state(PAIRS)
    Across(PAIRS, into_hybrid=True).retarget(state)
    found = _places(state)
    for (key, *place), (renamed, *same) in zip(hybrid, found, strict=True):
        (expected,) = {key.replace(old, new) for old, new in gpts.items() if old in key}
        assert (renamed, same) == (expected, place)
    Across(PAIRS, into_hybrid=False).retarget(state)
    assert _places(state) == hybrid


def test_what_a_gpt_has_nothing_of_stays() -> None:
    """Mamba layers, and the empty entry of an output layer, keep what the run made."""
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor

    weight = torch.ones(3)
    state = {
        "mamba": ShardedTensor.from_rank_offsets("decoder.layers.1.mixer.D", weight),
        "output": ShardedObject("output_layer._extra_state", None, (1,), (0,)),
        "step": 7,
    }
    Across(LayerPairs.of("*M-"), into_hybrid=True).retarget(state)
    assert [type(state[name]) for name in ("mamba", "output")] == [LocalNonpersistentObject] * 2
    assert (state["mamba"].unwrap() is weight, state["step"]) == (True, 7)


GPT = {"num_layers": 2, "num_experts": None, "moe_layer_freq": 1, "hybrid_layer_pattern": None, "sla": False}
GPT |= {"mtp_num_layers": None, "ckpt_format": "torch_dist", "use_distributed_optimizer": False}
RUN = {"load": "saved", "no_load_optim": False, "finetune": False}
PRUNED = {"sla": True, "sla_kv_projection": "pruned"}
EXPERTS = {"num_experts": 2}
BY_BUFFERS = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": False}


def _hybrid(pattern: str, **more: Any) -> dict[str, Any]:
    return {"hybrid_layer_pattern": pattern, "num_layers": len(pattern.replace("|", "")), **more}


#: What the run and the checkpoint have otherwise than a GPT of two layers, and why it is not loaded.
REFUSED = {
    "layers": (
        _hybrid("*-"),
        {},
        r"--hybrid-layer-pattern \*-: expected an attention layer .* for each of --, the GPT's",
    ),
    "experts": (_hybrid("*E*E"), {}, "--hybrid-layer-pattern .*: expected .* for each of --"),
    "some-experts": (_hybrid("*E*E"), EXPERTS | {"moe_layer_freq": [0, 1]}, "for each of -E, the GPT's in saved"),
    "unequal": (_hybrid("**-"), {}, "as many attention layers .* has 2 and 1"),
    "other-kinds": (_hybrid("G-*-"), {}, r"kinds \* - E M; G-\*- has G"),
    "further-tokens": (_hybrid("*-*-/*-"), {}, "no layers that predict further tokens"),
    "mamba": ({}, _hybrid("*-M*-"), r"--load saved: expected .* for a GPT; \*-M\*- has Mamba layers"),
    "number": ({}, _hybrid("*-*-*-"), "--num-layers 2: expected 3, as .* in saved has pairs of"),
    "gpt-experts": (EXPERTS, _hybrid("*-*-"), "--load saved: expected a checkpoint of the MLPs .* EE; .* are --"),
    "gpt-further": ({"mtp_num_layers": 1}, _hybrid("*-*-"), "--mtp-num-layers 1: expected none"),
    "further-left-behind": (_hybrid("*-*-"), {"mtp_num_layers": 1}, "--load saved: expected a GPT without --mtp-num"),
    "other-pattern": (_hybrid("**--"), _hybrid("*-|*-"), r"expected the layers of \*-\|\*-, as in the checkpoint"),
    "format": ({"ckpt_format": "fsdp_dtensor"}, _hybrid("*-*-"), "--ckpt-format fsdp_dtensor: expected torch_dist"),
    "buffers": (
        _hybrid("*-*-", use_distributed_optimizer=True),
        BY_BUFFERS,
        "--load saved: expected a checkpoint saved with --dist-ckpt-optim-fully-reshardable, or --no-load-optim",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    ours, theirs, line = REFUSED[name]
    with pytest.raises(FlagError, match=line) as refused:
        load_across_kinds(Namespace(**GPT | RUN | ours), Namespace(**GPT | theirs))
    assert "\n" not in str(refused.value)


#: The same, and whether upstream's own loading does it.
LOADED = {
    "same-kind": ({}, {}, True),
    "other-stages": (_hybrid("*-|*-"), _hybrid("*-*-"), True),
    "into-hybrid": (_hybrid("*-*-"), {}, True),
    "into-mamba": (_hybrid("M*-*-"), {}, True),
    "pruned-into-hybrid": (_hybrid("*-*-"), PRUNED, False),
    "mixed-into-hybrid": (_hybrid("*E*-"), EXPERTS | {"moe_layer_freq": 2}, False),
    "into-gpt": ({}, _hybrid("*-*-"), False),
    "into-gpt-from-older": ({}, {"hybrid_override_pattern": "*-*-", "num_layers": 4}, False),
    "without-optimizer": (_hybrid("*-*-", use_distributed_optimizer=True, no_load_optim=True), BY_BUFFERS, True),
}


@pytest.mark.parametrize("name", LOADED)
def test_upstream_is_touched_where_it_cannot(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped: list[Any] = []
    monkeypatch.setattr(gpt_hybrid_load, "wrap_once", wrapped.extend)
    ours, theirs, upstream = LOADED[name]
    load_across_kinds(Namespace(**GPT | RUN | ours), Namespace(**GPT | theirs))
    assert wrapped == ([] if upstream else list(gpt_hybrid_load.ACROSS_KINDS))


def test_another_function_is_said(capsys: pytest.CaptureFixture) -> None:
    load_across_kinds(Namespace(**GPT | RUN | _hybrid("**--")), Namespace(**GPT))
    assert "sla-megatron: warning: in **-- not every attention is followed by its MLP" in capsys.readouterr().out
    load_across_kinds(Namespace(**GPT | RUN | _hybrid("*-*-")), Namespace(**GPT))
    assert capsys.readouterr().out == ""


def test_a_megatron_without_such_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its development line: the command is named that makes a checkpoint which it can load."""
    monkeypatch.setattr(gpt_hybrid_load, "has_checkpoint_interop", lambda: False)
    for ours, theirs, command in ((_hybrid("*-*-"), {}, "gpt-to-hybrid"), ({}, _hybrid("*-*-"), "hybrid-to-gpt")):
        with pytest.raises(FlagError, match=f"--load saved: expected .* sla-convert {command} makes of it"):
            load_across_kinds(Namespace(**GPT | RUN | ours), Namespace(**GPT | theirs))
    load_across_kinds(Namespace(**GPT | RUN), Namespace(**GPT))
