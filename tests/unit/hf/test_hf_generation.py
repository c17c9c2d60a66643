"""Generation with the Hugging Face model: the same tokens with and without a cache, and what the cache holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, QuantizedCache
from transformers.cache_utils import Cache, Fp8QuantizedLayer

from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

from .hf_models import VOCABULARY, build, relative_error, tiny, tokens

#: Pruned: six layers, all groups skip by 3, so that layers 4 to 6 have no keys and values at all.
NO_OWN_KV = {"sla_skip_distances": [3], "sla_skip_groups": [0, 1, 2, 3], "sla_kv_projection": "pruned"}
MODELS = {
    "dense": {"sla_skip_distances": [], "sla_skip_groups": []},
    "full": {},
    "pruned": {"sla_kv_projection": "pruned", "position_embedding_type": "learned_absolute"},
    "two blocks": {"sla_skip_groups": [1, 3], "sla_skip_distances": [2]},
    "two blocks, pruned": {
        **{"sla_skip_groups": [1, 2, 3, 5, 6, 7], "sla_skip_distances": [4], "sla_kv_projection": "pruned"},
        **{"num_key_value_heads": 8},
    },
    "no own K/V": NO_OWN_KV,
    "no own K/V, full": NO_OWN_KV | {"sla_kv_projection": "full"},
    # Layers keep four keys and one value, or two values, or no keys at all.
    "values": {"sla_share": "values"},
    "values of layer 1": {
        **{"sla_share": "values", "sla_skip_distances": [], "sla_source_layers": [1], "sla_skip_groups": [1, 3]},
        **{"sla_kv_projection": "pruned", "position_embedding_type": "learned_absolute"},
    },
    "keys, all groups": NO_OWN_KV | {"sla_share": "keys"},
    "upper half": {
        **{"sla_skip_distances": [], "sla_source_layers": [3], "sla_skip_groups": [0, 1, 2, 3]},
        **{"sla_kv_projection": "pruned"},
    },
}
WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
}


def model_of(name: str, **changes: Any) -> SlaGPTForCausalLM:
    return build(tiny(**(MODELS[name] | changes)))


def generate(model: SlaGPTForCausalLM, prompt: Tensor, new: int = 8, **how: Any) -> Tensor:
    torch.manual_seed(5)
    how.setdefault("attention_mask", torch.ones_like(prompt))
    return model.generate(prompt, min_new_tokens=new, max_new_tokens=new, pad_token_id=0, **how)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_changes_no_token(name: str, way: str) -> None:
    model = model_of(name)
    cached = generate(model, tokens(), **WAYS[way])
    assert cached.shape == (2 * WAYS[way].get("num_return_sequences", 1), 11 + 8)
    assert cached.equal(generate(model, tokens(), **WAYS[way], use_cache=False))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_padded_batch_gives_each_prompt_its_own_tokens(name: str, implementation: str) -> None:
    model = model_of(name)
    model.set_attn_implementation(implementation)
    prompts = [tokens(1, length, seed=length) for length in (3, 7, 5)]
    batch, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 7 - prompt.shape[1] :], mask[row, 7 - prompt.shape[1] :] = prompt, 1
    alone = [generate(model, prompt, do_sample=False)[0, -8:] for prompt in prompts]
    assert generate(model, batch, attention_mask=mask, do_sample=False)[:, -8:].equal(torch.stack(alone))
    # A forward pass counts positions from the first real token too, although nobody gives it any.
    with torch.no_grad():
        logits = model(batch, attention_mask=mask).logits
        for row, prompt in enumerate(prompts):
            assert relative_error(logits[row, -prompt.shape[1] :], model(prompt).logits[0]) <= 1e-10


@pytest.mark.parametrize("name", ["full", "no own K/V"])
def test_other_ways_of_generating(name: str) -> None:
    """A cache of fixed size, and a draft model, whose rejected tokens are cropped from the cache."""
    model, greedy = model_of(name), {"do_sample": False}
    expected = generate(model, tokens(1), **greedy)
    assert generate(model, tokens(1), **greedy, cache_implementation="static", disable_compile=True).equal(expected)
    draft = build(tiny(num_hidden_layers=2, sla_skip_distances=[1]), seed=3)
    assert generate(model, tokens(1), **greedy, assistant_model=draft).equal(expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_compiles_in_one_graph_once(name: str) -> None:
    """As transformers asks of a model with ``_can_compile_fullgraph``: on a GPU it compiles steps by itself."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor], **__: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model, greedy = model_of(name), {"do_sample": False}
    config = CompileConfig(backend=keep, fullgraph=True)
    config._compile_all_devices = True
    torch.compiler.reset()
    compiled = generate(model, tokens(), **greedy, cache_implementation="static", compile_config=config)
    assert compiled.equal(generate(model, tokens(), **greedy))
    # One for seven steps: the prompt is not compiled, and no step is so different that it needs a graph of its own.
    assert len(graphs) == 1


# What the cache holds.


def cache_bytes(cache: Cache) -> int:
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in held)
    return sum(t.nbytes for t in held)


@pytest.mark.parametrize("mode", ["full", "pruned"])
@pytest.mark.parametrize("groups", [[], [1, 2, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("distances", [[4], [2, 4], [1]])
def test_each_live_group_is_cached_once_and_nothing_else(mode: str, groups: list[int], distances: list[int]) -> None:
    config = tiny(sla_kv_projection=mode, sla_skip_groups=groups, sla_skip_distances=distances)
    # The definition: a group is live where its own layer or a later one reads it.
    sources = {(config.source(layer, g), g) for layer in range(1, 7) for g in range(4)}
    dense = tiny(sla_skip_distances=[], sla_skip_groups=[])
    for each, groups_held in ((config, len(sources)), (dense, 6 * 4)):
        out = build(each, dtype=torch.float32).generate(
            tokens(3, 5), max_new_tokens=4, min_new_tokens=4, pad_token_id=0, return_dict_in_generate=True
        )
        # Five tokens and four new ones, of which the last is never run.
        assert cache_bytes(out.past_key_values) == 2 * 3 * 8 * each.head_dim * 4 * groups_held


def test_the_paper_s_model_caches_27_of_144_groups_less() -> None:
    config = SlaGPTConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=32,
        sla_skip_distances=[9], sla_skip_groups=[g for g in range(12) if g % 4],
    )  # fmt: skip
    with torch.no_grad():
        cache = build(config)(tokens(1, 8), use_cache=True).past_key_values
    assert cache_bytes(cache) == 2 * 8 * 4 * 8 * (144 - 27)


#: Settings of 12 layers by name -> tensors of a (layer, group) that are kept, of 2 * 12 * 12, counted by hand.
SETTINGS = {
    # Half of the values of 11 layers are layer 1's: 22.9 % less here, a quarter less of many layers.
    "SkipV1Former": (
        {"sla_share": "values", "sla_source_layers": [1], "sla_skip_groups": [1, 3, 5, 7, 9, 11]},
        288 - 11 * 6,
    ),
    "CLA of two": (
        {"sla_skip_distances": [1], "sla_skip_groups": list(range(12)), "sla_layers": [2, 4, 6, 8, 10, 12]},
        288 // 2,
    ),
    "half-shared": ({"sla_source_layers": [6], "sla_skip_groups": list(range(12))}, 288 // 2),
    # The last three layers keep three keys of twelve, and all of their values; or the reverse.
    "keys alone": ({"sla_share": "keys", "sla_skip_distances": [9]}, 288 - 27),
    "values alone": ({"sla_share": "values", "sla_skip_distances": [9]}, 288 - 27),
}


@pytest.mark.parametrize(("mode", "static"), [("full", False), ("pruned", True)])
@pytest.mark.parametrize("name", SETTINGS)
def test_named_settings_cache_what_is_live(name: str, mode: str, static: bool) -> None:
    changes, live = SETTINGS[name]
    shape = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 12}
    skipping = {"sla_skip_groups": [g for g in range(12) if g % 4], "sla_kv_projection": mode}
    model = build(SlaGPTConfig(**(shape | skipping | changes)), dtype=torch.float32)
    how = {"cache_implementation": "static", "disable_compile": True} if static else {}
    out = generate(model, tokens(2, 5), new=4, do_sample=False, return_dict_in_generate=True, **how)
    assert out.sequences.equal(generate(model, tokens(2, 5), new=4, do_sample=False, use_cache=False))
    # Two sequences of five tokens and four new ones, of which the last is never run, nor has it room.
    assert cache_bytes(out.past_key_values) == 2 * 8 * 4 * 4 * live


@torch.no_grad()
@pytest.mark.parametrize("name", ["values of layer 1", "keys, all groups"])
def test_caches_that_are_made_for_as_many_keys_as_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are filled; and quantised ones, here of finer numbers: eight bits would hide what is compared."""
    model = model_of(name)
    expected = generate(model, tokens(), do_sample=False)
    how = {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 4}
    out = generate(model, tokens(), do_sample=False, return_dict_in_generate=True, **how)
    assert out.sequences.equal(expected)
    assert {layer.keys.shape == layer.values.shape == (2, 4, 18, 4) for layer in out.past_key_values.layers} == {True}
    monkeypatch.setattr(Fp8QuantizedLayer, "fp8_dtype", torch.float16)
    cache = QuantizedCache("fp8", model.config)
    model(tokens()[:, :8], past_key_values=cache, use_cache=True)
    logits = model(tokens()[:, 8:], past_key_values=cache).logits
    assert relative_error(logits, model(tokens(), use_cache=False).logits[:, 8:]) <= 0.01


def caches(config: SlaGPTConfig) -> list[DynamicCache]:
    """As generation makes it, and as a user may, without the configuration."""
    return [DynamicCache(config=config), DynamicCache()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [0, 1])
@torch.no_grad()
def test_rearranged_caches_go_on_as_if_they_had_been_built_so(name: str, kind: int) -> None:
    model, batch, more = model_of(name), tokens(3, 9), tokens(6, 2, seed=8)

    def after(cache: Cache, rows: Tensor, length: int) -> None:
        assert cache.get_seq_length() == length
        new = more[: rows.shape[0]]
        expected = model(torch.cat([rows, new], dim=1)).logits[:, -2:]
        assert relative_error(model(new, past_key_values=cache).logits, expected) <= 1e-10

    def filled() -> Cache:
        cache = caches(model.config)[kind]
        model(batch, past_key_values=cache, use_cache=True)
        return cache

    after(filled(), batch, 9)
    order = torch.tensor([2, 0, 0])
    (cache := filled()).reorder_cache(order)
    after(cache, batch[order], 9)
    (cache := filled()).batch_select_indices(torch.tensor([1]))
    after(cache, batch[1:2], 9)
    (cache := filled()).batch_repeat_interleave(2)
    after(cache, batch.repeat_interleave(2, dim=0), 9)
    (cache := filled()).crop(-4)
    after(cache, batch[:, :-4], 5)


@torch.no_grad()
def test_layers_without_live_groups_store_nothing() -> None:
    model = model_of("no own K/V")
    for cache in caches(model.config):
        model(tokens(), past_key_values=cache, use_cache=True)
        assert [layer.keys is None for layer in cache.layers] == [number > 3 for number in range(1, len(cache) + 1)]


# Beyond the last learned position.


def padded(model: SlaGPTForCausalLM) -> dict[str, Tensor]:
    """Prompts of 6 and 3 tokens, the shorter one behind padding."""
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    return {"inputs": tokens(2, 6) * mask, "attention_mask": mask}


def embedded(model: SlaGPTForCausalLM) -> dict[str, Tensor]:
    return {"inputs_embeds": model.get_input_embeddings()(tokens(2, 6)).detach()}


def assisted(model: SlaGPTForCausalLM) -> dict[str, Any]:
    draft = build(tiny(num_hidden_layers=2, sla_skip_distances=[1]), seed=3)
    return {"inputs": tokens(1, 6), "assistant_model": draft}


def compiled(model: SlaGPTForCausalLM) -> dict[str, Any]:
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    torch.compiler.reset()
    return {"inputs": tokens(2, 6), "cache_implementation": "static", "compile_config": config}


#: How a model is asked, of prompts of 6 tokens.
ASKED: dict[str, Callable[[SlaGPTForCausalLM], dict[str, Any]]] = {
    "with a cache": lambda model: {"inputs": tokens(2, 6)},
    "without a cache": lambda model: {"inputs": tokens(2, 6), "use_cache": False},
    "sampled": lambda model: {"inputs": tokens(2, 6), "do_sample": True},
    "beams": lambda model: {"inputs": tokens(2, 6), "num_beams": 3},
    "padded": padded,
    "embeddings": embedded,
    "a static cache": lambda model: {
        **{"inputs": tokens(2, 6), "cache_implementation": "static", "disable_compile": True}
    },
    "compiled": compiled,
    "assisted": assisted,
    "looked up": lambda model: {"inputs": tokens(1, 6), "prompt_lookup_num_tokens": 2},
    "the prompt in chunks": lambda model: {"inputs": tokens(2, 6), "prefill_chunk_size": 4},
}
LEARNED = {"position_embedding_type": "learned_absolute", "max_position_embeddings": 10}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ASKED)
def test_generation_ends_at_the_last_learned_position(name: str) -> None:
    """As many tokens as there are positions, and one that is not run; then the model's own words."""
    model = model_of("full", **LEARNED)
    asked = ASKED[name](model)
    torch.manual_seed(5)
    # A prompt of 6, four more, and the last, whose position nobody needs.
    found = model.generate(**asked, min_new_tokens=5, max_new_tokens=5, pad_token_id=0)
    assert found.shape[1] == (5 if "inputs_embeds" in asked else 11)
    with pytest.raises(ValueError, match="^1[12] tokens, but positions are learned for max_position_embeddings=10$"):
        model.generate(**ASKED[name](model), min_new_tokens=6, max_new_tokens=6, pad_token_id=0)


@torch.no_grad()
def test_a_forward_pass_beyond_the_last_learned_position() -> None:
    model = model_of("full", **LEARNED)
    message = "^{} tokens, but positions are learned for max_position_embeddings=10$"
    with pytest.raises(ValueError, match=message.format(12)):
        model(tokens(2, 12))
    with pytest.raises(ValueError, match=message.format(12)):
        model.generate(tokens(2, 12), max_new_tokens=1)
    with pytest.raises(ValueError, match=message.format(12)):
        model(inputs_embeds=model.get_input_embeddings()(tokens(2, 12)))
    with pytest.raises(ValueError, match=message.format(31)):
        model(tokens(1, 2), position_ids=torch.tensor([[3, 30]]))
    cache = model(tokens(2, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=message.format(11)):
        model(tokens(2, 2), past_key_values=cache)
    # Padding has no position: a batch may be wider than the model's context.
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[:, :4] = 0
    wide, narrow = model(tokens(2, 12), attention_mask=mask).logits, model(tokens(2, 12)[:, 4:]).logits
    assert relative_error(wide[:, 4:], narrow) <= 1e-10
    # Rotary embedding has no last position.
    assert model_of("full", max_position_embeddings=10)(tokens(2, 12)).logits.shape[1] == 12


@torch.no_grad()
def test_the_cache_is_taken_by_transformers_newer_name() -> None:
    """``cache``, as generation gives it since 5.24; passed over, each token would be the first."""
    model, batch = build(tiny()), tokens()
    cache = DynamicCache(config=model.config)
    for part in batch.split([8, 1, 2], dim=1):
        logits = model(part, cache=cache).logits
    assert cache.get_seq_length() == batch.shape[1]
    assert relative_error(logits, model(batch, use_cache=False).logits[:, -2:]) <= 1e-10
