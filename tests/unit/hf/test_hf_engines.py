"""The Hugging Face model in engines that bring attention, a cache or a share of the heads of their own."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sla_megatron.hf import attention_sla_gpt
from sla_megatron.hf.attention_sla_gpt import SlaGPTAttention
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

from .hf_models import build, relative_error, tiny, tokens

#: By heads of keys and values, positions, distances and weights; most have groups that are torn apart.
MODELS = {
    "dense": {"sla_skip_distances": [], "sla_skip_groups": []},
    "GQA, rope, two distances": {},
    "GQA, learned, pruned": {"position_embedding_type": "learned_absolute", "sla_kv_projection": "pruned"},
    "MHA, rope, two blocks": {
        **{"num_key_value_heads": 8, "sla_skip_groups": [1, 2, 3, 5, 6, 7], "sla_skip_distances": [4]},
    },
    "MHA, learned, two distances, pruned": {
        **{"num_key_value_heads": 8, "sla_skip_groups": [0, 2, 3, 5, 6, 7], "sla_skip_distances": [4, 1]},
        **{"position_embedding_type": "learned_absolute", "sla_kv_projection": "pruned"},
    },
    "values of one layer": {"sla_share": "values", "sla_skip_distances": [], "sla_source_layers": [1]},
    "keys, two blocks, pruned": {
        **{"num_key_value_heads": 8, "sla_skip_groups": [1, 3, 5, 7], "sla_skip_distances": [2]},
        **{"sla_share": "keys", "sla_kv_projection": "pruned"},
    },
    "no own K/V": {"sla_skip_distances": [3], "sla_skip_groups": [0, 1, 2, 3], "sla_kv_projection": "pruned"},
}


class Engine:
    """Attention with a cache for each layer, as vLLM and SGLang put it behind transformers' interface."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.calls: Counter[int] = Counter()

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        layer = module.layer_idx
        self.calls[layer] += 1
        before = self.kept.get(layer, (key[:, :, :0], value[:, :, :0]))
        self.kept[layer] = key, value = tuple(torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
        new, total = query.shape[2], key.shape[2]
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_with_its_own_cache_gets_one_call_a_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "engine", engine)
    # No cache is so short that it would be copied for that alone.
    monkeypatch.setattr(attention_sla_gpt, "MOST_COPIED", 0)
    model, batch = build(tiny(**MODELS[name])), tokens(2, 24)
    expected = model(batch).logits
    model.set_attn_implementation("engine")
    found, start = [], 0
    for count in (16, 4, 1, 1, 2):
        engine.calls.clear()
        positions = torch.arange(start, start + count).unsqueeze(0)
        found.append(model(batch[:, start : start + count], position_ids=positions, use_cache=False).logits)
        assert engine.calls == dict.fromkeys(range(6), 1)
        start += count
    assert all(key.shape[1:3] == (model.config.num_key_value_heads, 24) for key, _ in engine.kept.values())
    assert (torch.cat(found, dim=1) - expected).abs().max() <= 1e-6


def batched(model: SlaGPTForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # 16 tokens a step: the longest prompt is cut.
    engine = ContinuousBatchingConfig(num_blocks=8, page_size=32, max_batch_tokens=16)
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=engine)
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in found.values()}
    return [list(by_prompt[tuple(prompt)]) for prompt in prompts]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in MODELS if name != "dense"])
def test_continuous_batching_gives_generate_s_tokens(name: str) -> None:
    model = build(tiny(**MODELS[name]), dtype=torch.float32)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 17, 1)]
    expected = []
    for prompt in prompts:
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        how = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected.append(model.generate(torch.tensor([prompt]), attention_mask=mask, **how)[0, len(prompt) :].tolist())
    # One prompt alone has steps of a single token.
    assert batched(model, prompts) + batched(model, prompts[:1]) == expected + expected[:1]


# Tensor parallelism.


def split(model: SlaGPTForCausalLM, size: int) -> list[list[SlaGPTAttention]]:
    """Each rank's attention, of all layers: the rows and columns that ``base_model_tp_plan`` gives it."""
    plan = model.config.base_model_tp_plan
    ranks = [build(model.config) for _ in range(size)]
    for rank, copy in enumerate(ranks):
        for layer in copy.model.layers:
            for name, linear in list(layer.self_attn.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                dim = {"colwise": 0, "rowwise": 1}[plan[f"layers.*.self_attn.{name}"]]
                linear.weight = nn.Parameter(linear.weight.chunk(size, dim)[rank])
                if linear.bias is not None:
                    linear.bias = nn.Parameter(linear.bias.chunk(size)[rank] if dim == 0 else linear.bias / size)
    return [[layer.self_attn for layer in copy.model.layers] for copy in ranks]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *[("dense", 2), ("dense", 4), ("MHA, rope, two blocks", 2), ("blocks of two", 2), ("blocks of two, pruned", 2)],
        *[("keys, two blocks, pruned", 2), ("keys, two blocks, pruned", 4)],
    ],
)
def test_ranks_that_hold_whole_blocks_of_heads_add_up(name: str, size: int) -> None:
    groups = {"sla_skip_groups": [1, 3], "sla_skip_distances": [2]}
    more = {"blocks of two": groups, "blocks of two, pruned": groups | {"sla_kv_projection": "pruned"}}
    model = build(tiny(qk_layernorm=True, **(MODELS | more)[name]))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    rotary = model.model.rotary_emb(x, torch.arange(5).unsqueeze(0))

    def run(layers: list[SlaGPTAttention]) -> list[Tensor]:
        """Each layer's output for the same input."""
        outputs, kept = [], {}
        for number, layer in enumerate(layers, start=1):
            output, _, kept[number] = layer(x, [kept[a][kind] for a, kind in layer.sources], rotary=rotary)
            outputs.append(output)
        return outputs

    expected = run([layer.self_attn for layer in model.model.layers])
    ranks = [run(layers) for layers in split(model, size)]
    for parts, whole in zip(zip(*ranks, strict=True), expected, strict=True):
        assert relative_error(sum(parts), whole) <= 1e-12


@pytest.mark.parametrize("has_more", [False, True])
def test_the_plan_names_every_linear_layer_and_nothing_that_is_not_there(has_more: bool) -> None:
    model = SlaGPTForCausalLM(tiny(gated_mlp=has_more, qk_layernorm=has_more))
    names = {re.sub(r"\d+", "*", name): module for name, module in model.named_modules()}
    # The embeddings' rule is transformers' own.
    assert set(model.tp_plan) <= set(names) and set(model.tp_plan.values()) <= set(ALL_PARALLEL_STYLES)
    assert {name for name, module in names.items() if isinstance(module, nn.Linear)} <= set(model.tp_plan)


def test_ranks_that_would_cut_a_block_are_refused() -> None:
    (layer, *_), _ = split(build(tiny()), 2)
    message = "^4 of 8 heads are on this rank, but only blocks of 8, .*the tensor-parallel size must divide 1$"
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(1, 3, 32, dtype=torch.float64), [])


# Pipeline parallelism.


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rope", "learned_absolute"])
def test_stages_of_a_dense_model_hand_on_hidden_states(positions: str) -> None:
    config = tiny(position_embedding_type=positions, **MODELS["dense"])
    first, last = build(config), build(config)
    assert first.supports_pp_plan and first.model.supports_pp_plan
    for number in range(6):
        (last if number < 3 else first).model.layers[number] = PipelineIdentityLayer()
    first.model.norm = last.model.embed_tokens = PipelineIdentityLayer()
    handed = first.model(tokens()).last_hidden_state
    assert relative_error(last(inputs_embeds=handed).logits, build(config)(tokens()).logits) <= 1e-12


def test_stages_that_cut_a_layer_from_its_source_are_refused() -> None:
    model = build(tiny())
    assert not (model.supports_pp_plan or model.model.supports_pp_plan)
    for number in range(3):
        model.model.layers[number] = PipelineIdentityLayer()
    # Of its sources, layers 2 and 4, the earlier one is missing; so is layer 2 of layer 4.
    with pytest.raises(ValueError, match="^layer 4 reads keys of layer 2, values of layer 2, .* given 0: pipeline"):
        model(tokens())


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_flex_attention_gets_one_shape_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles a kernel for each shape: one for a prompt, and one for a token behind a cache, however long."""
    monkeypatch.setattr(attention_sla_gpt, "MOST_COPIED", 0)
    flex, shapes = ALL_ATTENTION_FUNCTIONS["flex_attention"], set()

    def seen(module: nn.Module, query: Tensor, key: Tensor, *more: Any, **how: Any) -> tuple[Tensor, Tensor]:
        shapes.add((query.shape, key.shape))
        return flex(module, query, key, *more, **how)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", seen)
    model, batch = build(tiny(), dtype=torch.float32), tokens(2, 24)
    expected = model(batch).logits
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        prompt = model(batch[:, :-1], use_cache=True)
        token = model(batch[:, -1:], past_key_values=prompt.past_key_values)
    assert shapes == {((2, 8, s, 4), (2, 4, total, 4)) for s, total in ((23, 23), (1, 24))}
    assert relative_error(torch.cat([prompt.logits, token.logits], dim=1), expected) <= 1e-5
