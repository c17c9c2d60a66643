"""Core attention on ``torch.nn.functional.scaled_dot_product_attention``: no score matrix, no Transformer Engine.

Megatron's local ``DotProductAttention`` keeps ``[b, heads, s, s]`` scores and probabilities for the backward pass.
torch's function computes the same blockwise where it has a kernel for it (flash and memory-efficient on GPUs, flash on
CPUs), and falls back to the plain computation elsewhere: on the CPU with dropout, for one.

Shapes: s sequence, b batch, np query heads and ng K/V groups of this rank, hn channels a head.
"""

from __future__ import annotations

from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from ..common.errors import OFF, Refusal, refuse
from ..upstream.seams import Reliance

#: Values of ``--core-attention``.
MEGATRON, SDPA = "megatron", "sdpa"

FORWARD = Reliance(
    "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
    "overridden by TorchAttention, with --core-attention sdpa",
    ("self", "query", "key", "value", "attention_mask", "attn_mask_type", "attention_bias", "packed_seq_params"),
)

_REFUSED: tuple[Refusal, ...] = (
    ("transformer_impl", ("local",), "local with --core-attention sdpa"),
    ("context_parallel_size", (1,), "1 with --core-attention sdpa: Transformer Engine's attention splits the context"),
    ("window_size", OFF, "no --window-size with --core-attention sdpa"),
    ("softmax_type", ("vanilla",), "vanilla with --core-attention sdpa"),
    ("multi_latent_attention", OFF, "no multi-latent attention with --core-attention sdpa"),
)


def resolve_core_attention(args: Namespace) -> None:
    """Check validated arguments with ``--core-attention sdpa``, and have no mask made that nobody reads, in place.

    Raises:
        FlagError: for what torch's function does not do.
    """
    if getattr(args, "core_attention", MEGATRON) != SDPA:
        return
    FORWARD.require()
    refuse(args, _REFUSED)
    if not (args.reset_attention_mask or args.reset_position_ids):
        # Attention that knows it is causal needs no [s, s] mask, and is faster without one.
        args.create_attention_mask_in_dataloader = False


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
        with self._dropout_state():
            context = torch.nn.functional.scaled_dot_product_attention(
                *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
                attn_mask=None if attention_mask is None else attention_mask.logical_not(),
                dropout_p=self.attention_dropout.p if self.training else 0.0,
                is_causal=causal and query.size(0) > 1,
                scale=self._scale,
                enable_gqa=query.size(2) != key.size(2),
            )
        return context.permute(2, 0, 1, 3).flatten(2)

    @property
    def _scale(self) -> float:
        """Of the scores; upstream divides by the layer's number before the softmax and multiplies inside it."""
        scaled = self.config.apply_query_key_layer_scaling
        return self.softmax_scale * (self.layer_number if scaled else 1)

    def _dropout_state(self) -> AbstractContextManager:
        """As upstream: the tensor-parallel ranks' own random numbers, unless the sequence is split over them."""
        if self.config.sequence_parallel:
            return nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()


def torch_attention_spec(
    spec: ModuleSpec | TransformerBlockSubmodules,
) -> ModuleSpec | TransformerBlockSubmodules:
    """``spec`` (a layer's, or a block's) with :class:`TorchAttention` as core attention; nothing is modified.

    Raises:
        ValueError: where a layer's core attention is not upstream's ``DotProductAttention``.
    """
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=[torch_attention_spec(layer) for layer in spec.layer_specs])
    attention = spec.submodules.self_attention
    core = getattr(attention.submodules, "core_attention", None)
    found = core.module if isinstance(core, ModuleSpec) else core
    if found is not DotProductAttention:
        raise ValueError(
            "--core-attention sdpa replaces megatron.core.transformer.dot_product_attention.DotProductAttention; this "
            f"layer spec has {getattr(found, '__qualname__', found)} in its place"
        )
    core = replace(core, module=TorchAttention) if isinstance(core, ModuleSpec) else TorchAttention
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=core))
    return replace(spec, submodules=replace(spec.submodules, self_attention=attention))
