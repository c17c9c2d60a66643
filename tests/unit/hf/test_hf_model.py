"""The Hugging Face model against transformers' own models, and formulas, for what the reference leaves out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sla_megatron.hf.attention_sla_gpt import SlaGPTNorm
from sla_megatron.hf.pieces_sla_gpt import Pieces
from sla_megatron.hf.rotary_sla_gpt import SlaGPTRotaryEmbedding, apply_rotary

from .hf_models import LENGTH, VOCABULARY, build, relative_error, tiny, tokens


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
