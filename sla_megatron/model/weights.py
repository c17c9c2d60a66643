"""How many parameters the MLPs of a layer have, from the model's configuration alone.

Layers count from 0; ``config`` is Megatron's ``TransformerConfig``.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from ..common.patterns import EXPERTS

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def of_kinds(config: TransformerConfig, kinds: str) -> TransformerConfig:
    """``config`` of a hybrid model, for the functions below: its layers have experts where ``kinds`` has an ``E``."""
    config = copy.copy(config)
    config.moe_layer_freq = [int(kind == EXPERTS) for kind in kinds]
    return config


def mlp_weights(config: TransformerConfig, layer: int, experts: int | None = None) -> int:
    """Elements of the matrices of ``layer``'s MLP.

    Of a layer with experts: those of ``experts`` of them (``None``: all), of the shared one, and of the projections
    into the experts' width and back; not the router's.
    """
    (count, width, inner), *shared = _mlps(config, layer)
    elements = min(count, experts or count) * width * inner + sum(wide * long for _, wide, long in shared)
    projections = 2 * config.hidden_size * (_latent(config) if _has_experts(config, layer) else 0)
    return elements * (3 if config.gated_linear_unit else 2) + projections


def mlp_parameters(config: TransformerConfig, layer: int) -> int:
    """All parameters of ``layer``'s MLP: :func:`mlp_weights` of all experts, biases, the router."""
    biases = 0
    if config.add_bias_linear:
        first = 2 if config.gated_linear_unit else 1
        biases = sum(count * (first * inner + width) for count, width, inner in _mlps(config, layer))
    router = config.num_moe_experts * config.hidden_size if _has_experts(config, layer) else 0
    return mlp_weights(config, layer) + biases + router


def _mlps(config: TransformerConfig, layer: int) -> list[tuple[int, int, int]]:
    """(how many, width, inner size): the one of a plain layer; or the experts, and then a shared one."""
    if not _has_experts(config, layer):
        return [(1, config.hidden_size, config.ffn_hidden_size)]
    inner = config.moe_ffn_hidden_size or config.ffn_hidden_size
    found = [(config.num_moe_experts, _latent(config) or config.hidden_size, inner)]
    if config.moe_shared_expert_intermediate_size:
        found.append((1, config.hidden_size, config.moe_shared_expert_intermediate_size))
    return found


def _has_experts(config: TransformerConfig, layer: int) -> bool:
    frequency = config.moe_layer_freq
    among = frequency[layer] if isinstance(frequency, list) else layer % (frequency or 1) == 0
    return bool(config.num_moe_experts and among)


def _latent(config: TransformerConfig) -> int:
    """The experts' width where it is not the model's, or 0; Megatron has it from 0.19 on."""
    return getattr(config, "moe_latent_size", None) or 0
