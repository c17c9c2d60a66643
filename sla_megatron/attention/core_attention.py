"""Core attention on ``torch.nn.functional.scaled_dot_product_attention``: no score matrix, no Transformer Engine.

Megatron's local ``DotProductAttention`` keeps ``[b, heads, s, s]`` scores and probabilities for the backward pass.
torch's function computes the same blockwise where it has a kernel for it (flash and memory-efficient on GPUs, flash on
CPUs), and falls back to the plain computation elsewhere: on the CPU with dropout, for one.

Two things that Megatron's local attention does not do:

* Context parallelism: keys and values are gathered over the context-parallel group, as Megatron's ``--cp-comm-type
  all_gather`` does with Transformer Engine, and their gradients are reduced and scattered back.
* Documents that lie in one sample and do not see each other (``--dataloader-inter-document-masking``, ``--sft``).

Both cut causal attention into stretches (``stretches.py``), one call each; nowhere is there an ``[s, s]`` mask.

Shapes: s sequence (C context-parallel ranks hold s/C each), b batch, np query heads and ng K/V groups of this rank, hn
channels a head.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from ..upstream.seams import Reliance
from .stretches import Stretch, documents_of_samples, natural_order, stretches

#: What TorchAttention overrides and calls.
RELIED_ON = (
    Reliance(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        "overridden by TorchAttention, with --core-attention sdpa",
        ("self", "query", "key", "value", "attention_mask", "attn_mask_type", "attention_bias", "packed_seq_params"),
    ),
    Reliance(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.__init__",
        "overridden by TorchAttention, which knows context parallelism",
    ),
    Reliance(
        "megatron.core.tensor_parallel:gather_from_sequence_parallel_region",
        "called by TorchAttention over the context-parallel group: gathers the first dimension, and backward reduces "
        "and scatters it",
        ("input_", "tensor_parallel_output_grad", "group", "output_split_sizes", "use_global_buffer"),
    ),
)

#: Queries of one call where torch has no kernel for causal attention to more keys than queries.
_ROWS = 512


class TorchAttention(DotProductAttention):
    """Megatron's ``DotProductAttention`` with torch's fused function in the place of its ``forward``.

    Values and gradients agree up to rounding; with dropout the masks are other ones.  Arguments are upstream's.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        # Upstream's refuses more, since its forward knows nothing of it.
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)
        self.config = config
        self._context_parallel = None
        if config.context_parallel_size > 1:
            group = getattr(self.pg_collection, "cp", None)
            self._context_parallel = parallel_state.get_context_parallel_group() if group is None else group

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
        """Context ``[s/C, b, np * hn]`` of ``query`` ``[s/C, b, np, hn]``, ``key`` and ``value`` ``[s/C, b, ng, hn]``.

        ``attention_mask`` (``[b, 1, s/C, s]``, True where attention is masked) counts where there is one, as in
        upstream; else the mask type that the layer was built with.  ``packed_seq_params`` says where documents start,
        counted over all samples one after the other; with its format ``thd`` tensors have no ``b``.

        Raises ``NotImplementedError`` for what torch's function, or context parallelism here, does not do.
        """
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if attention_bias is not None:
            raise NotImplementedError("attention biases need Transformer Engine's attention")
        if packed and self._context_parallel is not None:
            raise NotImplementedError(
                "with context parallelism torch's attention takes packed samples side by side, as "
                "sla_megatron.training.data gives them, not one after the other"
            )
        if packed:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        key, value = self._gathered(key), self._gathered(value)
        # As upstream: the tensor-parallel ranks' own random numbers, unless the sequence is split over them.
        tracker = None if self.config.sequence_parallel else tensor_parallel.get_cuda_rng_tracker()
        with nullcontext() if tracker is None else tracker.fork():
            if attention_mask is None and self.attn_mask_type == AttnMaskType.causal:
                return self._causal(query, key, value, packed_seq_params)
            mask = None if attention_mask is None else attention_mask.logical_not()
            return self._attend(query, key, value, attn_mask=mask).flatten(2)

    def _gathered(self, tensor: Tensor) -> Tensor:
        """``[s/C, b, ng, hn]`` of each rank as ``[s, b, ng, hn]``, in the order of the sequence."""
        if self._context_parallel is None:
            return tensor
        size = self._context_parallel.size()
        whole = tensor_parallel.gather_from_sequence_parallel_region(tensor, group=self._context_parallel)
        chunks = whole.view(2 * size, -1, *whole.shape[1:])
        return torch.cat([chunks[place] for place in natural_order(size)])

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, packed_seq_params: Any) -> Tensor:
        """Causal attention of the rank's own queries within their documents, ``[s/C, b, np * hn]``."""
        length, num_samples = key.shape[:2]
        group = self._context_parallel
        place = (1, 0) if group is None else (group.size(), group.rank())
        documents = _documents(packed_seq_params, num_samples, length)
        # Samples that are cut alike are one call.
        samples = [slice(None)] if len(set(documents)) == 1 else [slice(i, i + 1) for i in range(num_samples)]
        contexts = []
        for sample, starts in zip(samples, documents, strict=False):
            pieces = [
                self._stretch(query[stretch.rows, sample], key[:, sample], value[:, sample], stretch)
                for stretch in stretches(length, starts, *place)
            ]
            contexts.append(_joined(pieces, 0))
        return _joined(contexts, 1).flatten(2)

    def _stretch(self, query: Tensor, key: Tensor, value: Tensor, stretch: Stretch) -> Tensor:
        """Causal attention of a stretch's queries to those of the whole keys and values that it reads."""
        keys, length = stretch.keys, len(key)
        if stretch.num_rows == stretch.num_keys:
            return self._attend(query, key[keys], value[keys], is_causal=stretch.num_rows > 1)
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            mask = causal_lower_right(stretch.num_rows, stretch.num_keys)
            return self._attend(query, key[keys], value[keys], attn_mask=mask)
        # No kernel knows this mask by itself, but all take one: of a few rows, and the same for all parts.
        mask = _lower_right(min(_ROWS, length), length, query.dtype, query.device)
        pieces = []
        for part in query.split(_ROWS):
            start, stop = keys.start, keys.stop - stretch.num_rows + sum(map(len, pieces)) + len(part)
            seen = mask[-len(part) :, length - (stop - start) :]
            pieces.append(self._attend(part, key[start:stop], value[start:stop], attn_mask=seen))
        return _joined(pieces, 0)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """One call of torch's function: ``[rows, b, np, hn]`` of as much, and keys and values ``[keys, b, ng, hn]``."""
        # Upstream divides by the layer's number before the softmax and multiplies inside it.
        scale = self.softmax_scale * (self.layer_number if self.config.apply_query_key_layer_scaling else 1)
        context = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
            dropout_p=self.attention_dropout.p if self.training else 0.0,
            scale=scale,
            enable_gqa=query.size(2) != key.size(2),
            **kwargs,
        )
        return context.permute(2, 0, 1, 3)


@lru_cache(maxsize=1)
def _lower_right(rows: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[rows, keys]``, to be added to scores: the last row reads all keys, the one before it all but the last.

    What a part of fewer rows and keys adds is its lower right corner.
    """
    with torch.inference_mode(False):
        return torch.full((rows, keys), float("-inf"), dtype=dtype, device=device).triu(keys - rows + 1)


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _documents(packed_seq_params: Any, num_samples: int, length: int) -> tuple[tuple[int, ...], ...]:
    """Where documents start in each sample; asks the device once for all layers of a microbatch."""
    if packed_seq_params is None:
        return ((0,),) * num_samples
    found = vars(packed_seq_params).get("sla_documents")
    if found is None:
        boundaries = packed_seq_params.cu_seqlens_q.tolist()
        found = packed_seq_params.sla_documents = documents_of_samples(boundaries, num_samples, length)
    return found
