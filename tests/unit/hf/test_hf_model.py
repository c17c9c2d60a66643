"""The Hugging Face model against the plain-PyTorch reference, transformers' own models and formulas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sla_megatron.hf.attention_sla_gpt import SlaGPTNorm
from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM
from sla_megatron.hf.pieces_sla_gpt import Pieces
from sla_megatron.hf.rotary_sla_gpt import SlaGPTRotaryEmbedding, apply_rotary
from tests.reference import ReferenceGPT

from .hf_models import LENGTH, VOCABULARY, build, relative_error, tiny, tokens

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


# transformers' own models, and formulas, for what the reference leaves out.


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 3.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        # Of 16 positions, which 40 tokens exceed.
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0},
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0 + i / 9 for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)],
        },
    ],
    ids=["plain", "linear", "llama3", "dynamic", "yarn", "longrope"],
)
def test_dense_model_is_llama(scaling: dict | None) -> None:
    config = tiny(
        head_dim=16, normalization="RMSNorm", attention_bias=False, mlp_bias=False, gated_mlp=True, hidden_act="silu",
        tie_word_embeddings=False, rope_theta=500.0, rope_scaling=scaling, sla_skip_distances=[], sla_skip_groups=[],
        max_position_embeddings=16 if scaling is not None and scaling["rope_type"] == "dynamic" else 64,
    )  # fmt: skip
    model = build(config)
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rope_theta",
              "tie_word_embeddings")  # fmt: skip
    # A copy: LlamaConfig adds the base to the dict that it is given.
    parameters = {"rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": 500.0}}
    llama = LlamaForCausalLM(
        LlamaConfig(**{name: getattr(config, name) for name in shared}, rms_norm_eps=config.norm_eps, **parameters)
    ).double()
    llama.load_state_dict(model.state_dict(), strict=True)
    batch = tokens(length=40)
    with torch.no_grad():
        # Llama rounds norms and angles to fp32.
        for each in (batch, batch[:, :9]):
            assert relative_error(model(each).logits, llama.eval()(each).logits) <= 1e-5


@pytest.mark.parametrize(("ours", "theirs"), [("gelu_pytorch_tanh", "gelu_new"), ("relu", "relu"), ("silu", "silu")])
def test_dense_model_is_gpt2(ours: str, theirs: str) -> None:
    config = tiny(
        num_key_value_heads=8, position_embedding_type="learned_absolute", hidden_act=ours, sla_skip_distances=[],
        sla_skip_groups=[],
    )  # fmt: skip
    model = build(config)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=6, n_head=8, n_positions=64, activation_function=theirs)
    ).double()
    ours_to_theirs = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj",
                      "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj", "model.layers": "transformer.h",
                      "model.embed_tokens": "transformer.wte", "model.embed_positions": "transformer.wpe",
                      "model.norm": "transformer.ln_f"}  # fmt: skip
    state = dict(model.state_dict())
    for layer in range(6):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"model.layers.{layer}.self_attn.{x}_proj.{kind}") for x in "qkv"]
            state[f"transformer.h.{layer}.attn.c_attn.{kind}"] = torch.cat(parts)
    renamed = {}
    for name, tensor in state.items():
        for old, new in ours_to_theirs.items():
            name = name.replace(old, new)
        # GPT-2's linear layers hold [in, out].
        renamed[name] = tensor.T if ".c_" in name and name.endswith("weight") else tensor
    gpt2.load_state_dict(renamed, strict=True)
    with torch.no_grad():
        assert relative_error(model(tokens()).logits, gpt2.eval()(tokens()).logits) <= 1e-10


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [0.25, 1.0])
def test_rotary_embedding_turns_complex_numbers(interleaved: bool, percent: float) -> None:
    config = tiny(head_dim=16, rotary_percent=percent, rope_theta=100.0, rotary_interleaved=interleaved)
    x, dim = torch.randn(2, LENGTH, 3, 16, dtype=torch.float64), config.rotary_dim
    positions = torch.arange(LENGTH, dtype=torch.float64)[:, None]
    cos, sin = SlaGPTRotaryEmbedding(config)(x, positions.T)
    turned = apply_rotary(x, cos, sin, interleaved)

    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2) for i in range(dim // 2)]
    expected = x.clone()
    for i, (a, b) in enumerate(pairs):
        turn = torch.polar(torch.ones_like(positions), positions * 100.0 ** (-2 * i / dim))
        number = torch.complex(x[..., a], x[..., b]) * turn
        expected[..., a], expected[..., b] = number.real, number.imag
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)


def test_interleaved_model_is_the_other_one_with_its_rows_reordered() -> None:
    config = tiny(head_dim=16, rotary_percent=0.5)
    model, interleaved = build(config), build(tiny(head_dim=16, rotary_percent=0.5, rotary_interleaved=True))
    order = [*[i // 2 + 4 * (i % 2) for i in range(8)], *range(8, 16)]
    state = model.state_dict()
    for name, tensor in state.items():
        if "q_proj" in name or "k_proj" in name:
            state[name] = tensor.unflatten(0, (-1, 16))[:, order].flatten(0, 1)
    interleaved.load_state_dict(state)
    with torch.no_grad():
        assert relative_error(interleaved(tokens()).logits, model(tokens()).logits) <= 1e-12


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_zero_centered_norms_multiply_by_one_more(normalization: str) -> None:
    model = build(tiny(normalization=normalization, qk_layernorm=True))
    centered = build(tiny(normalization=normalization, qk_layernorm=True, norm_zero_centered=True))
    state = model.state_dict()
    norms = [name + ".weight" for name, module in model.named_modules() if isinstance(module, SlaGPTNorm)]
    assert len(norms) == 6 * 4 + 1
    centered.load_state_dict(state | {name: state[name] - 1 for name in norms})
    with torch.no_grad():
        assert relative_error(centered(tokens()).logits, model(tokens()).logits) <= 1e-12


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_mlp(name: str, gated: bool) -> None:
    mlp = build(tiny(hidden_act=name, gated_mlp=gated)).model.layers[0].mlp
    x = torch.randn(3, 32, dtype=torch.float64)
    inner = ACTIVATIONS[name](mlp.gate_proj(x)) * mlp.up_proj(x) if gated else ACTIVATIONS[name](mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), mlp.down_proj(inner))


@pytest.mark.parametrize("by_index", [True, False])
def test_pieces_take_and_put_back_are_inverse(by_index: bool) -> None:
    pieces = Pieces([[1, 2, 5], [4, 0], [3]], total=6, width=2)
    x = torch.arange(12)
    taken = pieces.take(x, 0, by_index)
    assert [t.tolist() for t in taken] == [[2, 3, 4, 5, 10, 11], [8, 9, 0, 1], [6, 7]]
    assert pieces.put_back(taken, 0, by_index).tolist() == list(range(12))
    # Heads that are left out, and neighbours, which are taken as one view.
    [part] = Pieces([[2, 3]], total=5).take(torch.arange(5), 0, by_index)
    assert part.tolist() == [2, 3] and part._is_view()
    whole = torch.arange(4)
    assert Pieces([[0, 1]], total=2, width=2).take(whole, 0, by_index)[0] is whole


def test_a_model_that_generated_in_inference_mode_trains() -> None:
    """What it made to take heads out in another order is not an inference tensor that a backward pass would refuse."""
    model = build(tiny())
    with torch.inference_mode():
        # A single token is what an index is made for.
        expected = model(tokens(length=1)).logits
    logits = model(tokens(length=1)).logits
    assert logits.equal(expected)
    model(tokens()).logits.sum().backward()
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
