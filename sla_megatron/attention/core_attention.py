"""Core attention on ``torch.nn.functional.scaled_dot_product_attention``: no score matrix, no Transformer Engine.

Megatron's local ``DotProductAttention`` keeps ``[b, heads, s, s]`` scores and probabilities for the backward pass.
torch's function computes the same blockwise where it has a kernel for it (flash and memory-efficient on GPUs, flash on
CPUs), and falls back to the plain computation elsewhere: on the CPU with dropout, for one.

Shapes: s sequence, b batch, np query heads and ng K/V groups of this rank, hn channels a head.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from ..upstream.seams import Reliance

FORWARD = Reliance(
    "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
    "overridden by TorchAttention, with --core-attention sdpa",
    ("self", "query", "key", "value", "attention_mask", "attn_mask_type", "attention_bias", "packed_seq_params"),
)


class TorchAttention(DotProductAttention):
    """Megatron's ``DotProductAttention`` with torch's fused function in the place of its ``forward``.

    Values and gradients agree up to rounding; with dropout the masks are other ones.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Context ``[s, b, np * hn]`` of ``query`` ``[s, b, np, hn]``, ``key`` and ``value`` ``[s, b, ng, hn]``.

        ``attention_mask`` (``[b, 1, s, s]``, True where attention is masked) counts where there is one, as in upstream;
        else the mask type that the layer was built with.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise NotImplementedError("packed sequences and attention biases need Transformer Engine's attention")
        causal = attention_mask is None and self.attn_mask_type == AttnMaskType.causal
        # Upstream divides by the layer's number before the softmax and multiplies inside it.
        scale = self.softmax_scale * (self.layer_number if self.config.apply_query_key_layer_scaling else 1)
        # As upstream: the tensor-parallel ranks' own random numbers, unless the sequence is split over them.
        tracker = None if self.config.sequence_parallel else tensor_parallel.get_cuda_rng_tracker()
        with nullcontext() if tracker is None else tracker.fork():
            context = torch.nn.functional.scaled_dot_product_attention(
                *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
                attn_mask=None if attention_mask is None else attention_mask.logical_not(),
                dropout_p=self.attention_dropout.p if self.training else 0.0,
                is_causal=causal and query.size(0) > 1,
                scale=scale,
                enable_gqa=query.size(2) != key.size(2),
            )
        return context.permute(2, 0, 1, 3).flatten(2)
