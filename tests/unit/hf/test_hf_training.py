"""Losses, gradients, precisions and attention kernels of the Hugging Face model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sla_megatron.hf import attention_sla_gpt
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

from .hf_models import LENGTH, VOCABULARY, build, relative_error, tiny, tokens


@pytest.fixture
def compiler() -> Iterator[None]:
    """No compiled code of other tests, and none left for them."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


EVERY_GROUP = {"sla_skip_groups": [0, 1, 2, 3]}


def test_loss_is_shifted_and_leaves_out_masked_labels() -> None:
    model, batch = build(tiny(), dtype=torch.float32), tokens()
    labels = batch.clone()
    labels[0, 4:7] = -100
    out = model(batch, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
    # As the Trainer calls it, with the number of labels in all of a step's batches.
    out = model(batch, labels=labels, num_items_in_batch=torch.tensor(34))
    torch.testing.assert_close(out.loss, expected * 17 / 34)


def test_logits_to_keep() -> None:
    model, batch = build(tiny()), tokens()
    with torch.no_grad():
        every = model(batch).logits
        torch.testing.assert_close(model(batch, logits_to_keep=2).logits, every[:, -2:])
        chosen = torch.tensor([0, 5])
        torch.testing.assert_close(model(batch, logits_to_keep=chosen).logits, every[:, chosen])


def test_embeddings_instead_of_tokens() -> None:
    model, batch = build(tiny(position_embedding_type="learned_absolute")), tokens()
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch)
        torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(batch).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(batch, inputs_embeds=embedded)


def test_more_tokens_than_learned_positions() -> None:
    model = build(tiny(position_embedding_type="learned_absolute", max_position_embeddings=12))
    cache = model(tokens(length=12), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="13 tokens, but positions are learned for max_position_embeddings=12"):
        model(tokens(length=1), past_key_values=cache)


def test_a_later_token_changes_no_earlier_logits() -> None:
    model, batch = build(tiny()), tokens()
    changed = batch.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(batch).logits, model(changed).logits
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).min() > 1e-3


def gradients(model: SlaGPTForCausalLM, batch: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(batch).logits.flatten(0, 1), batch.flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


#: Settings whose layers hand on different things: both or one, to one reader or to many, or nothing of their own.
HANDED_ON = {
    "full": {},
    "no own K/V": {"sla_kv_projection": "pruned", **EVERY_GROUP},
    "values of two layers": {"sla_share": "values", "sla_skip_distances": [], "sla_source_layers": [1, 3]},
    "keys, pruned": {"sla_share": "keys", "sla_kv_projection": "pruned", **EVERY_GROUP},
    "upper half": {"sla_skip_distances": [], "sla_source_layers": [3], **EVERY_GROUP},
}


@pytest.mark.parametrize("changes", HANDED_ON.values(), ids=HANDED_ON)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(changes: dict, reentrant: bool) -> None:
    model, batch = build(tiny(**changes)).train(), tokens()
    expected = gradients(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert model.is_activation_checkpointing
    found = gradients(model, batch)
    assert set(found) == set(expected)
    assert max(relative_error(found[name], expected[name]) for name in expected) <= 1e-12


def test_compiled_model(compiler: None) -> None:
    changes = {"num_hidden_layers": 3, "sla_skip_distances": [1, 2]}
    model, batch = build(tiny(**changes)), tokens()
    expected, expected_gradients = model(batch, use_cache=False).logits, gradients(model, batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(batch, use_cache=False).logits
    assert relative_error(logits, expected) <= 1e-12
    model.zero_grad()
    F.cross_entropy(logits.flatten(0, 1), batch.flatten()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(relative_error(found[name], expected_gradients[name]) for name in expected_gradients) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_half_precision(dtype: torch.dtype, normalization: str) -> None:
    config = tiny(normalization=normalization, qk_layernorm=True, norm_zero_centered=True, initializer_range=0.1)
    model = build(config, dtype=torch.float32)
    with torch.no_grad():
        expected = model(tokens()).logits
        logits = model.to(dtype)(tokens()).logits
    assert logits.dtype == dtype
    assert relative_error(logits.float(), expected) <= 16 * torch.finfo(dtype).eps


# Which attention is called with what.


def calls(model: SlaGPTForCausalLM, monkeypatch: pytest.MonkeyPatch, **inputs: Any) -> tuple[list[dict], Any]:
    """Every call of the attention function that a forward makes, and its result."""
    made = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple:
        made.append({"layer": module.layer_idx + 1, "query": query, "key": key, "value": value})
        return sdpa(module, query, key, value, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", record)
        return made, model(**inputs)


#: Groups, those that skip, and distances: one block, two blocks, and one whose stored order is not the groups' own.
PATTERNS = {"NSSS": (4, [1, 2, 3], [4]), "NSNS": (4, [1, 3], [2]), "N2S4S2": (4, [1, 2, 3], [2, 4])}


def patterned(name: str, mode: str) -> SlaGPTForCausalLM:
    groups, skipping, distances = PATTERNS[name]
    return build(
        tiny(num_key_value_heads=groups, sla_skip_groups=skipping, sla_skip_distances=distances, sla_kv_projection=mode)
    )


@pytest.mark.parametrize("mode", ["full", "pruned"])
@pytest.mark.parametrize("name", PATTERNS)
def test_many_tokens_take_one_call_a_layer(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, out = calls(model := patterned(name, mode), monkeypatch, input_ids=tokens(), use_cache=True)
    assert [call["layer"] for call in made] == [1, 2, 3, 4, 5, 6]
    for call in made:
        # Each group's keys and values are its source's, wherever that keeps them.
        for group in range(4):
            source = model.config.source(call["layer"], group)
            place = model.config.stored_groups(source, "key").index(group)
            cached = out.past_key_values.layers[source - 1]
            assert call["key"][:, group].equal(cached.keys[:, place])
            assert call["value"][:, group].equal(cached.values[:, place])


@pytest.mark.parametrize("mode", ["full", "pruned"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_token_takes_one_call_a_source_on_views_of_the_cache(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_sla_gpt, "MOST_COPIED", 0)
    model = patterned(name, mode)
    config = model.config
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).past_key_values
    made, _ = calls(model, monkeypatch, input_ids=tokens(2, 1, seed=3), past_key_values=cache)
    held = {t.data_ptr(): t for layer in cache.layers for t in (layer.keys, layer.values)}
    starts = {t.untyped_storage().data_ptr() for t in held.values()}
    sources = [(layer, source) for layer in range(1, 7) for source in config.reads_in_block(layer, "key")]
    assert [call["layer"] for call in made] == [layer for layer, _ in sources]
    for call, (layer, source) in zip(made, sources, strict=True):
        groups = [g for g in range(4) if config.source(layer, g) == source]
        for part in (call["key"], call["value"]):
            assert part.untyped_storage().data_ptr() in starts
            assert part.numel() == 2 * len(groups) * (LENGTH + 1) * 4
        assert call["query"].numel() == 2 * 2 * len(groups) * 4


@pytest.mark.parametrize("mode", ["full", "pruned"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_short_cache_is_copied_for_a_token_up_to_the_limit(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the one call that then is, and with the same result; torn groups are never copied."""
    model = patterned(name, mode)
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).past_key_values
    found: dict[int, tuple[int, Tensor]] = {}
    # Keys and values of 2 sequences, 12 tokens, 4 groups of 4 elements in fp64.
    for limit in (size := 2 * 2 * (LENGTH + 1) * 4 * 4 * 8, size - 1):
        monkeypatch.setattr(attention_sla_gpt, "MOST_COPIED", limit)
        asked = {"input_ids": tokens(2, 1, seed=3), "past_key_values": copy.deepcopy(cache)}
        made, out = calls(model, monkeypatch, **asked)
        found[limit] = (len(made), out.logits)
    parts = sum(len(model.config.reads_in_block(layer, "key")) for layer in range(1, 7))
    torn = sum(layer.self_attn.reads[0].pieces.is_torn for layer in model.model.layers)
    assert found[size - 1][0] == parts
    assert found[size][0] == 6 if not torn else found[size][0] > 6
    assert relative_error(found[size][1], found[size - 1][1]) <= 1e-12


def operations(model: SlaGPTForCausalLM) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens())
    return counter.get_total_flops()


def test_projections_that_nobody_reads_are_not_computed() -> None:
    """Without gradients a full model does what the pruned one does, where it has its weights to itself."""
    full, pruned = (patterned("NSSS", mode) for mode in ("full", "pruned"))
    assert operations(full) == operations(pruned)
    with torch.no_grad():
        expected = full(tokens()).logits
    # Layers 5 and 6 read keys and values of one group in four, which are projected together or not at all.
    seen: list[tuple[int, ...]] = []
    for layer in full.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    more = 2 * 2 * (2 * LENGTH) * 32 * (3 * 4)
    assert operations(full) == operations(pruned) + 2 * more
    assert seen == [(2, LENGTH, 16)] * 6
    with torch.no_grad():
        assert relative_error(full(tokens()).logits, expected) <= 1e-12


def test_what_takes_the_place_of_a_projection_is_called() -> None:
    class Adapter(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    plain, adapted = patterned("NSSS", "full"), patterned("NSSS", "full")
    for layer in adapted.model.layers:
        layer.self_attn.v_proj.__class__ = Adapter
    for layer in plain.model.layers:
        layer.self_attn.v_proj.bias.data += 1
    with torch.no_grad():
        assert relative_error(adapted(tokens()).logits, plain(tokens()).logits) <= 1e-12


def test_a_layer_that_reads_one_source_rearranges_no_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = calls(build(tiny(sla_skip_distances=[])), monkeypatch, input_ids=tokens(), use_cache=False)
    assert len(made) == 6
    assert all(call["query"].shape[1] == 8 and call["key"].shape[1] == 4 for call in made)


@pytest.mark.parametrize("mode", ["full", "pruned"])
@pytest.mark.parametrize("padded", [False, True])
def test_eager_attention_is_sdpa(mode: str, padded: bool) -> None:
    config = tiny(sla_kv_projection=mode)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, : 3 if padded else 0] = 0
    model = build(config)
    with torch.no_grad():
        expected = model(tokens(), attention_mask=mask).logits
        model.set_attn_implementation("eager")
        found = model(tokens(), attention_mask=mask).logits
    assert relative_error(found[mask.bool()], expected[mask.bool()]) <= 1e-10


def test_attention_weights_come_in_the_order_of_the_heads() -> None:
    model = build(tiny())
    model.set_attn_implementation("eager")
    layer, head = 5, 3  # A skip head, of group 1 in the sixth layer.
    q_proj = model.model.layers[layer].self_attn.q_proj
    with torch.no_grad():
        q_proj.weight.unflatten(0, (8, 4))[head] = 0
        q_proj.bias.unflatten(0, (8, 4))[head] = 0
        out = model(tokens(), output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 8, LENGTH, LENGTH)] * 6
    assert len(out.hidden_states) == 7
    uniform = torch.ones(LENGTH, LENGTH, dtype=torch.float64).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    is_uniform = [torch.allclose(out.attentions[layer][0, h], uniform) for h in range(8)]
    assert is_uniform == [h == head for h in range(8)]


@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_attention_weights_of_a_token_are_the_last_row_of_those_of_all_tokens(name: str) -> None:
    model = patterned(name, "full")
    model.set_attn_implementation("eager")
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    whole = model(tokens(), attention_mask=mask, output_attentions=True)
    cache = model(tokens()[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
    last = model(tokens()[:, -1:], attention_mask=mask, past_key_values=cache, output_attentions=True)
    assert relative_error(last.logits[:, 0], whole.logits[:, -1]) <= 1e-10
    for row, weights in zip(last.attentions, whole.attentions, strict=True):
        assert row.shape == (2, 8, 1, LENGTH)
        torch.testing.assert_close(row, weights[:, :, -1:])


# Initial weights.


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights(zero_centered: bool, tied: bool) -> None:
    torch.manual_seed(0)
    model = SlaGPTForCausalLM(
        tiny(initializer_range=0.05, tie_word_embeddings=tied, norm_zero_centered=zero_centered, qk_layernorm=True)
    )
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "norm" in name:
            assert (tensor == (0 if zero_centered else 1)).all(), name
        else:
            error = 5 * 0.05 / math.sqrt(2 * tensor.numel())
            assert tensor.std().item() == pytest.approx(0.05, abs=error), name
