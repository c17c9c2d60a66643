"""What transformers' tools ask of every model, each of which its own tests of models found missing here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaModel

from sla_megatron.hf import attention_sla_gpt
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM, SlaGPTModel

from .hf_models import LENGTH, VOCABULARY, build, relative_error, tiny, tokens


@pytest.mark.parametrize("groups", [[1, 2, 3], []])
def test_gradients_of_attention_weights(groups: list[int]) -> None:
    """Along a direction: what the output changes by, when the weights of one layer are moved along it."""
    model = build(tiny(sla_skip_groups=groups))
    model.set_attn_implementation("eager")
    factors = torch.randn(2, LENGTH, VOCABULARY, dtype=torch.float64)
    out = model(tokens(), output_attentions=True)
    for weights in out.attentions:
        weights.retain_grad()
    (out.logits * factors).sum().backward()

    softmax, direction = F.softmax, torch.randn(2, 8, LENGTH, LENGTH, dtype=torch.float64)
    sums = []
    for step in (-1e-5, 1e-5):
        layers = iter(range(6))

        def moved(scores: Tensor, step: float = step, layers: Iterator[int] = layers, **how: Any) -> Tensor:
            weights = softmax(scores, **how)
            return weights + step * direction.reshape(weights.shape) if next(layers) == 3 else weights

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(attention_sla_gpt.nn.functional, "softmax", moved)
            sums.append((model(tokens()).logits * factors).sum())
    slope = (sums[1] - sums[0]) / 2e-5
    torch.testing.assert_close((out.attentions[3].grad * direction).sum(), slope, rtol=1e-5, atol=1e-9)
    assert all(weights.grad.any() for weights in out.attentions)


def test_transformers_sees_what_a_forward_pass_can_be_asked_for() -> None:
    """By the annotation of ``kwargs``, which its tools read: the same as its own models'."""
    for ours, llama in ((SlaGPTModel, LlamaModel), (SlaGPTForCausalLM, LlamaForCausalLM)):
        kinds = [inspect.signature(model.forward).parameters["kwargs"].annotation for model in (ours, llama)]
        assert kinds[0] == kinds[1]
        assert "output_attentions" in kinds[0].__args__[0].__annotations__


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["rope", "learned_absolute"])
def test_sequences_one_after_the_other_do_not_see_each_other(implementation: str, positions: str) -> None:
    """Where positions begin anew, a sequence does: training and engines leave out padding that way."""
    model = build(tiny(position_embedding_type=positions))
    model.set_attn_implementation(implementation)
    first, second = tokens(1, 5), tokens(1, 8, seed=2)
    places = torch.cat([torch.arange(5), torch.arange(8)]).unsqueeze(0)
    packed = model(torch.cat([first, second], dim=1), position_ids=places, use_cache=False).logits
    assert relative_error(packed, torch.cat([model(first).logits, model(second).logits], dim=1)) <= 1e-10
