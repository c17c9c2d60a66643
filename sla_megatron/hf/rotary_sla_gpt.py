"""SLA-GPT's rotary embedding: transformers' frequencies, of every kind that it scales them by.

Shapes: b batch, s new tokens, r elements of a head that are turned (the configuration's ``rotary_dim``).

This file goes into exported folders: it needs torch, transformers and ``configuration_sla_gpt.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_sla_gpt import SlaGPTConfig


class SlaGPTRotaryEmbedding(nn.Module):
    """Cosine and sine of each position's angles, once for all layers.

    Frequencies are fp32 whatever the model is: in bf16, they would be wrong by a whole turn from position 800 on.  That
    no checkpoint holds them, and loading leaves them empty, is known to transformers, which fills the buffers of a
    module that has these names.
    """

    inv_freq: Tensor

    def __init__(self, config: SlaGPTConfig) -> None:
        super().__init__()
        # The attributes that dynamic_rope_update asks for, which changes frequencies with the length of the context.
        self.config = config
        self.rope_type = config.rope_parameters.get("rope_type", "default")
        self.interleaved = config.rotary_interleaved
        self._reset(None)

    def _reset(self, device: torch.device | None) -> None:
        functions: dict[str, Callable[..., tuple[Tensor, float]]] = {
            "default": self.compute_default_rope_parameters,
            **ROPE_INIT_FUNCTIONS,
        }
        inv_freq, self.attention_scaling = functions[self.rope_type](self.config, device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)
        self.max_seq_len_cached = self.original_max_seq_len = self.config.max_position_embeddings

    @staticmethod
    def compute_default_rope_parameters(
        config: SlaGPTConfig, device: torch.device | None = None, **_: Any
    ) -> tuple[Tensor, float]:
        """Frequencies without scaling, ``[r / 2]``, and the factor 1; by transformers' name for it."""
        dim = config.rotary_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        return 1.0 / config.rope_theta**exponents, 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """``to``, ``half`` and their like: another device is followed, another precision is not."""
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self._reset(self.inv_freq.device)
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine, and sine with the sign that :func:`apply_rotary` needs: ``[b or 1, s, 1, r]`` each, of x's type.

        Args:
            x: gives type and device.
            position_ids: ``[b or 1, s]``.
        """
        angles = position_ids[:, :, None, None].float() * self.inv_freq.to(x.device)
        angles = angles.to(torch.promote_types(x.dtype, torch.float32))
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        pairs = ((cos, cos), (-sin, sin))
        if self.interleaved:
            cos, sin = (torch.stack(pair, dim=-1).flatten(-2) for pair in pairs)
        else:
            cos, sin = (torch.cat(pair, dim=-1) for pair in pairs)
        return cos.to(x.dtype), sin.to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the first elements of each head.

    transformers negates an element of each pair in every layer's queries and keys; here the sine has that sign, once.

    Args:
        x: ``[b, s, heads, d]``.
        cos: ``[b or 1, s, 1, r]``, each pair's cosine at both of its elements.
        sin: likewise, negative at the first of the two.
        interleaved: pairs are neighbours, rather than an element of each half.
    """
    turned, kept = x, None
    if cos.shape[-1] < x.shape[-1]:
        turned, kept = x.split_with_sizes([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    if interleaved:
        swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
    turned = torch.addcmul(turned * cos, swapped, sin)
    return turned if kept is None else torch.cat((turned, kept), dim=-1)
