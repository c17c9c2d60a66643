"""Of a ``full`` model's K/V weights, the rows that are read: gathered with a prompt, and never of other weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.counting import OperationCounter
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM
from sla_megatron.hf.pieces_sla_gpt import _Seen

from .hf_models import build, relative_error, tiny, tokens

#: The last two of six layers read keys and values of their first group in four.
PATTERN = {"sla_skip_distances": [4]}
LAST = slice(4, 6)


def generated(**changes: Any) -> tuple[SlaGPTForCausalLM, Any]:
    """A model that ran a prompt and a token, and its cache."""
    model = build(tiny(**(PATTERN | changes)))
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).past_key_values
        model(tokens(length=1), past_key_values=cache)
    return model, cache


@torch.no_grad()
def next_token(model: SlaGPTForCausalLM, cache: Any) -> Tensor:
    return model(tokens(length=1, seed=3), past_key_values=copy.deepcopy(cache)).logits


def kept(model: SlaGPTForCausalLM) -> list[Tensor]:
    made = [layer.self_attn.live_rows._made for layer in model.model.layers[LAST]]
    return [tensor for one in made if one is not None for tensor in one[1:] if tensor is not None]


def test_weights_are_gathered_with_a_prompt_and_for_no_token() -> None:
    model, cache = generated()
    assert [layer.self_attn.live_rows is not None for layer in model.model.layers] == [False] * 4 + [True] * 2
    counts = []
    for ids in (tokens(length=1), tokens(length=1, seed=2), tokens(length=2)):
        with torch.no_grad(), OperationCounter() as counter:
            model(ids, past_key_values=cache)
        counts.append(counter.operations["index_select"])
    # Of two layers the weights and biases of keys and values, anew with several tokens.
    assert counts == [0, 0, 2 * 4]
    # Two layers' keys and values of one group: weights of 32 columns, and biases, in fp64.
    assert sum(t.untyped_storage().nbytes() for t in kept(model)) == 2 * 2 * 1 * 4 * (32 + 1) * 8


# What changes weights.


def projections(model: SlaGPTForCausalLM) -> list[nn.Linear]:
    return [p for layer in model.model.layers[LAST] for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]


def in_place(model: SlaGPTForCausalLM) -> None:
    with torch.no_grad():
        for projection in projections(model):
            projection.weight.mul_(1.5)


def biases_in_place(model: SlaGPTForCausalLM) -> None:
    with torch.no_grad():
        for projection in projections(model):
            projection.bias.add_(1)


def other_data(model: SlaGPTForCausalLM) -> None:
    for projection in projections(model):
        projection.weight.data = projection.weight.data * 1.5


def another_parameter(model: SlaGPTForCausalLM) -> None:
    for projection in projections(model):
        projection.weight = nn.Parameter(projection.weight.detach() * 1.5)


def another_parameter_in_the_same_memory(model: SlaGPTForCausalLM) -> None:
    for projection in projections(model):
        data = projection.weight.data.mul_(1.5)
        del projection.weight
        projection.weight = nn.Parameter(data)


def loaded(assign: bool) -> Callable[[SlaGPTForCausalLM], None]:
    return lambda model: model.load_state_dict(build(tiny(**PATTERN), seed=7).state_dict(), assign=assign) and None


def trained(model: SlaGPTForCausalLM) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()


def rounded(model: SlaGPTForCausalLM) -> None:
    model.to(torch.bfloat16).double()


def replaced_projection(model: SlaGPTForCausalLM) -> None:
    for layer in model.model.layers[LAST]:
        layer.self_attn.k_proj = copy.deepcopy(layer.self_attn.k_proj)
        layer.self_attn.k_proj.weight.data.mul_(1.5)


CHANGES: dict[str, Callable[[SlaGPTForCausalLM], None]] = {
    "in place": in_place,
    "biases in place": biases_in_place,
    "other data": other_data,
    "another parameter": another_parameter,
    "another parameter in the same memory": another_parameter_in_the_same_memory,
    "a state dict": loaded(assign=False),
    "a state dict, assigned": loaded(assign=True),
    "an optimizer's step": trained,
    "another precision and back": rounded,
    "another module": replaced_projection,
}


def fresh(model: SlaGPTForCausalLM) -> SlaGPTForCausalLM:
    """Another model of the same weights."""
    other = build(model.config)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("name", CHANGES)
def test_the_next_token_is_of_the_new_weights(name: str) -> None:
    model, cache = generated()
    before = next_token(model, cache)
    CHANGES[name](model)
    expected = next_token(fresh(model), cache)
    # Were it not to tell, nothing would be shown.
    assert relative_error(before, expected) > 1e-6
    assert relative_error(next_token(model, cache), expected) <= 1e-12


def test_rows_that_are_never_looked_at_again_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Seen, "is_same", lambda self, parameter: True)
    model, cache = generated()
    in_place(model)
    assert relative_error(next_token(model, cache), next_token(fresh(model), cache)) > 1e-6


def test_a_prompt_sees_what_counts_no_version() -> None:
    """As when an adapter is merged into ``weight.data``."""
    model, _ = generated()
    for projection in projections(model):
        projection.weight.data += 0.3
    with torch.no_grad():
        assert relative_error(model(tokens()).logits, fresh(model)(tokens()).logits) <= 1e-12


def test_a_hook_an_adapter_and_a_quantiser_are_not_passed_by() -> None:
    model, cache = generated()
    expected = next_token(fresh(model), cache)
    seen: list[int] = []
    for projection in projections(model):
        projection.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    assert relative_error(next_token(model, cache), expected) <= 1e-12
    assert seen == [16] * 4
    assert not kept(model)


# Where they are not.


def test_they_are_not_saved_copied_or_kept_for_training() -> None:
    model, cache = generated()
    assert kept(model)
    never = fresh(model)
    assert model.state_dict().keys() == never.state_dict().keys()
    assert not kept(copy.deepcopy(model)) and not kept(pickle.loads(pickle.dumps(model)))
    assert kept(model)
    # One for all: to another precision, another device, into training.
    assert not kept(copy.copy(model).to(torch.float32))
    model.double()
    next_token(model, cache)
    assert kept(model)
    model(tokens(), labels=tokens()).loss.backward()
    assert not kept(model)


def test_in_inference_mode_and_after() -> None:
    """Rows that were made there serve generation outside of it, and training does without."""
    model = build(tiny(**PATTERN))
    with torch.inference_mode():
        cache = model(tokens(), use_cache=True).past_key_values
        expected = model(tokens(length=1, seed=3), past_key_values=copy.deepcopy(cache)).logits.clone()
    assert kept(model)
    assert relative_error(next_token(model, cache), expected) <= 1e-12
    model(tokens(), labels=tokens()).loss.backward()
    with torch.inference_mode():
        # A model that was made there counts no versions.
        made = build(tiny(**PATTERN))
        cache = made(tokens(), use_cache=True).past_key_values
        assert relative_error(made(tokens(length=1, seed=3), past_key_values=cache).logits, expected) <= 1e-12
