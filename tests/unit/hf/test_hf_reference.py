"""The Hugging Face model against the plain-PyTorch reference: logits and every gradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM
from tests.reference import ReferenceGPT

from .hf_models import VOCABULARY, build, relative_error, tiny, tokens

HIDDEN, INNER = 24, 40

# The reference: Megatron's weights, and where each goes.

CASES = list(
    itertools.product(
        [(4, 4), (6, 3), (12, 4)],  # heads, groups
        [False, True],  # rope
        [False, True],  # rms_norm
        ["full", "pruned"],
        [((), 0), ((4,), 3), ((2, 3), 3), ((1,), None)],  # distances, skip groups (None: all)
    )
)


def reference_of(case: tuple, index: int) -> ReferenceGPT:
    """The other options take turns, so that each meets every value of the grid's."""
    (heads, groups), rope, rms_norm, mode, (distances, skip) = case
    return ReferenceGPT(
        num_layers=6,
        num_heads=heads,
        num_groups=groups,
        head_size=8,
        distances=distances,
        num_skip_groups=groups if skip is None else min(skip, groups),
        consumer_layers=(3, 4, 6) if index % 5 == 4 else None,
        pruned=mode == "pruned",
        rope=rope,
        rotary_percent=0.5 if index % 3 == 1 else 1.0,
        rms_norm=rms_norm,
        swiglu=index % 2 == 1,
    )


def reference_weights(ref: ReferenceGPT, bias: bool, qk_norm: bool, tied: bool, seed: int) -> dict[str, Tensor]:
    """Random weights with Megatron's names and shapes, fp64, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    w: dict[str, Tensor] = {}

    def add(name: str, *shape: int, center: float = 0.0) -> None:
        w[name] = center + 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def add_linear(name: str, rows: int, columns: int) -> None:
        add(name + ".weight", rows, columns)
        if bias:
            add(name + ".bias", rows)

    def add_norm(name: str, size: int) -> None:
        add(name + ".weight", size, center=1.0)
        if not ref.rms_norm:
            add(name + ".bias", size)

    add("embedding.word_embeddings.weight", VOCABULARY, HIDDEN)
    if not ref.rope:
        add("embedding.position_embeddings.weight", 32, HIDDEN)
    for layer in range(1, ref.num_layers + 1):
        p = f"decoder.layers.{layer - 1}."
        keys, values = (sum(ref.is_projected(layer, g, k) for g in range(ref.num_groups)) for k in ("key", "value"))
        add_norm(p + "input_layernorm", HIDDEN)
        add_linear(p + "self_attention.linear_qkv", (ref.num_heads + keys + values) * ref.head_size, HIDDEN)
        add_linear(p + "self_attention.linear_proj", HIDDEN, ref.num_heads * ref.head_size)
        if qk_norm:
            add_norm(p + "self_attention.q_layernorm", ref.head_size)
            if keys:
                add_norm(p + "self_attention.k_layernorm", ref.head_size)
        add_norm(p + "pre_mlp_layernorm", HIDDEN)
        add_linear(p + "mlp.linear_fc1", INNER * (2 if ref.swiglu else 1), HIDDEN)
        add_linear(p + "mlp.linear_fc2", HIDDEN, INNER)
    add_norm("decoder.final_layernorm", HIDDEN)
    if not tied:
        add("output_layer.weight", VOCABULARY, HIDDEN)
    return {name: tensor.requires_grad_() for name, tensor in w.items()}


PLAIN_NAMES = {
    "embedding.word_embeddings": "model.embed_tokens",
    "embedding.position_embeddings": "model.embed_positions",
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc2": "mlp.down_proj",
    "decoder.layers": "model.layers",
}


def to_hf(ref: ReferenceGPT, w: dict[str, Tensor]) -> dict[str, Tensor]:
    """Megatron's tensors (or their gradients) under the Hugging Face names."""
    return {name: part for megatron, tensor in w.items() for name, part in _to_hf(ref, megatron, tensor)}


def _to_hf(ref: ReferenceGPT, megatron: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    name = megatron
    for old, new in PLAIN_NAMES.items():
        name = name.replace(old, new)
    if "linear_fc1" in name:
        parts = tensor.chunk(2) if ref.swiglu else [tensor]
        for new, part in zip(["gate_proj", "up_proj"] if ref.swiglu else ["up_proj"], parts, strict=True):
            yield name.replace("linear_fc1", new), part
    elif "linear_qkv" in name:
        layer, rows = int(name.split(".")[2]) + 1, iter(tensor.split(ref.head_size))
        parts = {"q_proj": [], "k_proj": [], "v_proj": []}
        for group in range(ref.num_groups):
            parts["q_proj"] += [next(rows) for _ in range(ref.num_heads // ref.num_groups)]
            for kind in ("key", "value"):
                if ref.is_projected(layer, group, kind):
                    parts[f"{kind[0]}_proj"].append(next(rows))
        for new, heads in parts.items():
            if heads:
                yield name.replace("self_attention.linear_qkv", f"self_attn.{new}"), torch.cat(heads)
    else:
        yield name, tensor


def config_of(ref: ReferenceGPT, bias: bool, qk_norm: bool, tied: bool) -> SlaGPTConfig:
    k, total = ref.num_skip_groups, ref.num_groups
    return SlaGPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=ref.num_layers,
        num_attention_heads=ref.num_heads,
        num_key_value_heads=ref.num_groups,
        head_dim=ref.head_size,
        hidden_act="silu" if ref.swiglu else "gelu",
        gated_mlp=ref.swiglu,
        max_position_embeddings=32,
        normalization="RMSNorm" if ref.rms_norm else "LayerNorm",
        position_embedding_type="rope" if ref.rope else "learned_absolute",
        rotary_percent=ref.rotary_percent,
        attention_bias=bias,
        mlp_bias=bias,
        qk_layernorm=qk_norm,
        tie_word_embeddings=tied,
        sla_skip_distances=list(ref.distances),
        sla_skip_groups=[g for g in range(total) if (g + 1) * k // total > g * k // total],
        sla_layers=None if ref.consumer_layers is None else list(ref.consumer_layers),
        sla_kv_projection="pruned" if ref.pruned else "full",
        sla_share=ref.share,
        sla_source_layers=list(ref.source_layers),
    )


@pytest.mark.parametrize("index", range(len(CASES)))
def test_logits_and_every_gradient_are_the_reference_s(index: int) -> None:
    require_reference(reference_of(CASES[index], index), index)


def require_reference(ref: ReferenceGPT, index: int) -> None:
    """Biases, norms of queries and keys and tied embeddings take turns by ``index``."""
    bias, qk_norm, tied = index % 4 != 3, index % 7 < 3, index % 3 != 2
    w = reference_weights(ref, bias, qk_norm, tied, seed=index)
    model = SlaGPTForCausalLM(config_of(ref, bias, qk_norm, tied)).double()
    state = {name: tensor.detach() for name, tensor in to_hf(ref, w).items()}
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)

    batch, labels = tokens(), tokens(seed=2)
    logits = model(batch).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    ref.loss(w, batch, labels).backward()

    errors = {"logits": relative_error(logits, ref.logits(w, batch))}
    expected = to_hf(ref, {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in w.items()})
    actual = dict(model.named_parameters())
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        # A layer whose K/V nobody reads does not run these projections at all.
        found = torch.zeros_like(gradient) if actual[name].grad is None else actual[name].grad
        # The softmax does not change with the key's bias: that gradient is zero, and noise has no relative error.
        zero = gradient.abs().max() < 1e-12
        errors[name] = found.abs().max().item() if zero else relative_error(found, gradient)
    assert max(errors.values()) <= 1e-10, sorted(errors.items(), key=lambda item: -item[1])[:5]


#: What is shared from where: share, distances, source layers, skip groups (None: all), consumer layers.
VARIANTS = {
    "values": ("values", (4,), (), 3, None),
    "values, two distances": ("values", (2, 3), (), 3, None),
    "values of layer 1 (SkipV1Former)": ("values", (), (1,), 2, None),
    "values, two sources": ("values", (), (1, 3), 3, (3, 4, 6)),
    "values, all groups": ("values", (1,), (), None, (2, 4, 6)),
    "keys": ("keys", (4,), (), 3, None),
    "keys of two layers": ("keys", (), (2, 1), 3, None),
    "keys, all groups": ("keys", (3,), (), None, None),
    "kv of one source": ("kv", (), (2,), 3, None),
    "kv, two sources": ("kv", (), (3, 1), 3, (2, 4, 5)),
    "kv, upper half": ("kv", (), (3,), None, None),
    "kv of pairs (CLA)": ("kv", (1,), (), None, (2, 4, 6)),
}


@pytest.mark.parametrize("mode", ["full", "pruned"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_the_reference_s(name: str, mode: str) -> None:
    """Heads, positions and norms take turns, so that keys and values meet each value of all of these."""
    share, distances, sources, skip, layers = VARIANTS[name]
    index = list(VARIANTS).index(name) + (5 if mode == "full" else 0)
    heads, groups = [(4, 4), (8, 4), (12, 4)][index % 3]
    ref = ReferenceGPT(
        **{"num_layers": 6, "num_heads": heads, "num_groups": groups, "head_size": 8, "distances": distances},
        **{"num_skip_groups": groups if skip is None else skip, "consumer_layers": layers, "pruned": mode == "pruned"},
        **{"rope": index % 2 == 0, "rotary_percent": 0.5 if index % 4 == 2 else 1.0, "rms_norm": index % 3 == 1},
        **{"share": share, "source_layers": sources},
    )
    require_reference(ref, index)


@torch.no_grad()
def test_each_variant_is_another_function_of_the_same_weights() -> None:
    """So that a model that shared something else would not be the reference's."""
    logits = []
    for share, distances, sources, skip, layers in VARIANTS.values():
        skipping = {"sla_skip_groups": [g for g in range(4) if skip is None or (g + 1) * skip // 4 > g * skip // 4]}
        origins = {"sla_skip_distances": list(distances), "sla_source_layers": list(sources)}
        logits.append(build(tiny(sla_share=share, sla_layers=layers, **skipping, **origins))(tokens()).logits)
    for one, other in itertools.combinations(logits, 2):
        assert relative_error(one, other) > 1e-2
