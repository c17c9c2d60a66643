"""Tiny models that the tests of the Hugging Face model share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

VOCABULARY, LENGTH = 53, 11


def tiny(**changes: Any) -> SlaGPTConfig:
    """Six layers and eight heads in four groups, of which three skip by 2, 4 and 2 layers."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "position_embedding_type": "rope",
        "initializer_range": 0.3,
        "sla_skip_distances": [2, 4],
        "sla_skip_groups": [1, 2, 3],
    }
    return SlaGPTConfig(**(shape | changes))


def build(config: SlaGPTConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> SlaGPTForCausalLM:
    """A model whose every parameter is random, norms and biases too."""
    torch.manual_seed(seed)
    model = SlaGPTForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
