"""Operations of layers that mix tokens without attention, by Megatron's own count.  Pure Python.

Restates ``mamba_layer_flops`` and ``gdn_layer_flops`` within
``megatron.training.training:num_floating_point_operations`` (0.19.0 to 0.19.2, and main at d98e8a64), forward and for
one token.
"""

from __future__ import annotations

from typing import Any


def mixers(config: Any) -> dict[str, float]:
    """Symbol of a kind of layer -> its forward operations a token; ``config`` is a ``TransformerConfig``."""
    return {"M": _mamba(config), "G": _gated_delta_net(config)}


def _mamba(config: Any) -> float:
    hidden, state = config.hidden_size, config.mamba_state_dim
    inner = 2 * hidden
    heads = config.mamba_num_heads or inner // config.mamba_head_dim
    projected_in = 2 * hidden * (2 * inner + 2 * config.mamba_num_groups * state + heads)
    return projected_in + 7 * inner * state + 2 * inner * hidden


def _gated_delta_net(config: Any) -> float:
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    keys = config.linear_key_head_dim * config.linear_num_key_heads
    values = config.linear_value_head_dim * heads
    projected_in = hidden * (2 * keys + 2 * values + 2 * heads)
    convolution = config.linear_conv_kernel_dim * (2 * keys + values)
    rule = 4 * heads * config.linear_value_head_dim**2
    return 2 * (projected_in + convolution + rule + hidden * values)
