"""SLA-GPT's attention, and the norm and rotary embedding that it needs.

Shapes: b batch, s new tokens, S all tokens (past and new), h hidden, d head size, H query heads, G key/value groups,
P groups that a layer has K/V weights for, N groups whose K/V it keeps (live ones, in the configuration's stored order),
R blocks of groups that do the same in every layer (the configuration's ``G / period``), n groups of a block.

This file goes into exported folders: it needs torch, transformers and ``configuration_sla_gpt.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_sla_gpt import SlaGPTConfig

#: Keys and values.
KV = tuple[Tensor, Tensor]


class SlaGPTNorm(nn.Module):
    """LayerNorm or RMSNorm of the last dimension, computed in fp32 at least."""

    def __init__(self, config: SlaGPTConfig, size: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.zero_centered = config.norm_zero_centered
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.normalization == "LayerNorm" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[.., size]`` to ``[.., size]``."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Added in fp32: in bf16, 1 + weight would lose most of the weight.
        weight = self.weight.to(dtype) + 1 if self.zero_centered else self.weight.to(dtype)
        wide = x.to(dtype)
        if self.bias is not None:
            return nn.functional.layer_norm(wide, weight.shape, weight, self.bias.to(dtype), self.eps).to(x.dtype)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * weight).to(x.dtype)


# Rotary embedding.


def rotary_frequencies(config: SlaGPTConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair, ``[rotary_dim / 2]``, fp32.

    Computed where it is used: a buffer would be left empty by loading through the meta device, and rounded by
    ``model.to(torch.bfloat16)``.
    """
    dim = config.rotary_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slowed = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    # Llama 3: wavelengths short against the original context are kept, long ones are stretched, and it is linear in
    # the number of turns within that context in between.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(slowed, frequencies, kept)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the first elements of each head.  x ``[b, heads, s, d]``; cos, sin ``[b or 1, 1, s, rotary_dim / 2]``."""
    turned, kept = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


# Attention.


class Pieces:
    """Takes heads out in another order.

    By views, and a concatenation where neighbours are torn apart; but for a single token, in generation, one operation
    with an index does that: its time is mostly that of starting operations.  The index is no buffer, which would have
    to be filled after loading: each device's is made when it is first used.

    Args:
        orders: lists of head indices; together each index at most once.
        total: how many heads there are.
        width: how many elements of the tensor's dimension belong to one index.
    """

    def __init__(self, orders: Sequence[Sequence[int]], total: int, width: int = 1) -> None:
        starts = {0} | {order[0] for order in orders} | {order[-1] + 1 for order in orders}
        starts |= {cut for order in orders for a, b in pairwise(order) if b != a + 1 for cut in (a + 1, b)}
        starts = sorted(starts - {total})
        self.sizes = [(b - a) * width for a, b in pairwise([*starts, total])]
        piece_of = {start: piece for piece, start in enumerate(starts)}
        self.pieces = [[piece_of[index] for index in order if index in piece_of] for order in orders]

        #: For each element of the tensors that ``take`` gives, one after the other, where it is taken from.
        self.order = [index * width + i for order in orders for index in order for i in range(width)]
        self.taken = [len(order) * width for order in orders]
        self.is_identity = len(orders) == 1 and self.order == list(range(total * width))
        self.is_torn = any(len(pieces) > 1 for pieces in self.pieces)
        self._indices: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def take(self, x: Tensor, dim: int, by_index: bool = False) -> list[Tensor]:
        """One tensor per order."""
        if self.is_identity:
            return [x]
        if self.is_torn and by_index:
            taken = x.index_select(dim, self._index(x.device)[0])
            return [taken] if len(self.taken) == 1 else list(taken.split(self.taken, dim))
        split = x.split(self.sizes, dim)
        return [_cat([split[piece] for piece in pieces], dim) for pieces in self.pieces]

    def put_back(self, outputs: Sequence[Tensor], dim: int, by_index: bool = False) -> Tensor:
        """The tensors that ``take`` gave (or others of their sizes), together in the original order."""
        if self.is_identity:
            return outputs[0]
        if self.is_torn and by_index:
            return _cat(outputs, dim).index_select(dim, self._index(outputs[0].device)[1])
        found: dict[int, Tensor] = {}
        for output, pieces in zip(outputs, self.pieces, strict=True):
            parts = [output] if len(pieces) == 1 else output.split([self.sizes[piece] for piece in pieces], dim)
            found.update(zip(pieces, parts, strict=True))
        return _cat([found[piece] for piece in sorted(found)], dim)

    def _index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``order`` and its inverse."""
        if device not in self._indices:
            order = torch.tensor(self.order)
            self._indices[device] = (order.to(device), order.argsort().to(device))
        return self._indices[device]


def _is_eager_inference() -> bool:
    """Neither are gradients wanted, which an index made in inference mode could not serve, nor does a compiler fuse."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _is_plain(linear: nn.Module) -> bool:
    """Whether its weights may be used without calling it.

    Not with an adapter, a quantiser, a hook or offloading in its place.
    """
    hooked = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not hooked


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out.  query ``[b, heads, s, d]``, key and value ``[b, groups, S, d]``, mask additive."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = grouped @ key.unsqueeze(2).transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask.unsqueeze(1)
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    output = (weights @ value.unsqueeze(2)).flatten(1, 2)
    return output.transpose(1, 2).contiguous(), weights.flatten(1, 2)


class SlaGPTAttention(nn.Module):
    """Self-attention that reads its own K/V and those of earlier layers."""

    is_causal = True

    def __init__(self, config: SlaGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = d = config.head_dim
        self.num_key_value_groups = per_group = config.num_attention_heads // config.num_key_value_heads
        self.scaling = d**-0.5

        # The configuration counts layers from 1.
        number, period = layer_idx + 1, config.period
        self.blocks = config.num_key_value_heads // period
        reads, stored = config.reads_in_block(number), config.stored_in_block(number)
        #: Of each layer that is read, itself the last: first and count of the groups, in a block of its stored ones.
        self.places = [(config.stored_in_block(a).index(groups[0]), len(groups)) for a, groups in reads.items()]
        self.reads_own = number in reads
        #: Of one block: where what is read goes among the keys and values, and its queries and outputs among the heads.
        self.kv_pieces = Pieces(list(reads.values()), period)
        self.query_pieces = Pieces(list(reads.values()), period, per_group)
        projected = [g for g in config.projected_groups(number) if g < period]
        self.stored_pieces = Pieces([[projected.index(g) for g in stored]], len(projected)) if stored else None
        #: Where most weights of keys and values are of groups that nobody reads, the rows of those that are.
        self.live_rows: Pieces | None = None
        if stored and 2 * len(stored) <= len(projected):
            order = [block * len(projected) + projected.index(g) for block in range(self.blocks) for g in stored]
            self.live_rows = Pieces([order], self.blocks * len(projected), d)

        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.blocks * len(projected) * d, bias=bias) if projected else None
        self.v_proj = nn.Linear(config.hidden_size, self.blocks * len(projected) * d, bias=bias) if projected else None
        self.o_proj = nn.Linear(config.num_attention_heads * d, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = SlaGPTNorm(config, d) if config.qk_layernorm else None
        self.k_norm = SlaGPTNorm(config, d) if config.qk_layernorm and projected else None

    def forward(
        self,
        hidden_states: Tensor,
        sources: Sequence[KV],
        attention_mask: Tensor | None = None,
        rotary: KV | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, KV | None]:
        """Attend.

        Args:
            hidden_states: ``[b, s, h]``.
            sources: of each earlier layer that this one reads, ascending, the keys and values that it keeps, ``[b, N,
                S, d]`` each.
            rotary: cosine and sine, each ``[b or 1, 1, s, rotary_dim / 2]``.

        Returns:
            the output ``[b, s, h]``; the weights ``[b, H, s, S]`` where the implementation gives them; the layer's own
            keys and values, ``[b, N, S, d]`` each, ``None`` where nothing reads them.
        """
        query = self._position(self._heads(self.q_proj(hidden_states)), self.q_norm, rotary)
        own = self._project_kv(hidden_states, rotary)
        if own is not None and past_key_values is not None:
            own = past_key_values.update(*own, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attend = partial(attend, self, dropout=0.0, scaling=self.scaling, **kwargs)
        if self.kv_pieces.is_identity and self.reads_own:
            output, weights = attend(query, *own, attention_mask)
        else:
            stores = [tuple(t.to(query.device) for t in source) for source in sources]
            stores += [own] if self.reads_own else []
            in_parts = query.shape[2] == 1 and not self.kv_pieces.is_identity
            attend_to = self._attend_to_parts if in_parts else self._attend_to_whole
            output, weights = attend_to(attend, query, stores, attention_mask)
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1)), weights, own

    def _attend_to_whole(
        self, attend: Callable, query: Tensor, stores: Sequence[KV], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One call, on the keys and values together: a copy of both, little beside what several tokens make of them."""
        key, value = (self._joined(tensors) for tensors in zip(*stores, strict=True))
        return attend(query, key, value, mask)

    def _joined(self, stores: Sequence[Tensor]) -> Tensor:
        """What is read of each, ``[b, N, S, d]``, as ``[b, G, S, d]``."""
        blocks = [
            t.unflatten(1, (self.blocks, -1)).narrow(2, *place) for t, place in zip(stores, self.places, strict=True)
        ]
        return self.kv_pieces.put_back(blocks, 2).flatten(1, 2)

    def _attend_to_parts(
        self, attend: Callable, query: Tensor, stores: Sequence[KV], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One call for each layer that is read, on views of its keys and values: blocks become part of the batch.

        For a single token, whose time is mostly that of reading the cache: copying it would double that.
        """
        batch, by_index = query.shape[0], _is_eager_inference()
        rows = batch * self.blocks
        queries = self.query_pieces.take(query.reshape(rows, -1, *query.shape[2:]), 1, by_index)
        if mask is not None:
            mask = mask.repeat_interleave(self.blocks, dim=0)
        shape = (rows, -1, *stores[0][0].shape[2:])
        results = []
        for part, (key, value), (first, count) in zip(queries, stores, self.places, strict=True):
            key, value = key.reshape(shape), value.reshape(shape)
            # A view that changes nothing would cost time too.
            if count < key.shape[1]:
                key, value = key.narrow(1, first, count), value.narrow(1, first, count)
            results.append(attend(part, key, value, mask))
        output = self.query_pieces.put_back([result[0] for result in results], 2, by_index)
        if results[0][1] is None:
            return output, None
        weights = self.query_pieces.put_back([result[1] for result in results], 1, by_index)
        return output, weights.reshape(batch, -1, *weights.shape[2:])

    def _project_kv(self, hidden_states: Tensor, rotary: KV | None) -> KV | None:
        """The keys and values that some layer reads: ``[b, N, s, d]`` each, in the stored order."""
        if self.stored_pieces is None:
            return None
        key, value = (self._project(projection, hidden_states) for projection in (self.k_proj, self.v_proj))
        return self._position(key, self.k_norm, rotary), value.transpose(1, 2)

    def _project(self, projection: nn.Module, hidden_states: Tensor) -> Tensor:
        """``[b, s, h]`` to ``[b, s, N, d]``, in the stored order."""
        if self.live_rows is not None and _is_eager_inference() and _is_plain(projection):
            weight, bias = (
                None if whole is None else self.live_rows.take(whole, 0, by_index=True)[0]
                for whole in (projection.weight, projection.bias)
            )
            return self._heads(nn.functional.linear(hidden_states, weight, bias))
        projected = projection(hidden_states)
        if self.stored_pieces.is_identity:
            return self._heads(projected)
        blocks = projected.unflatten(-1, (self.blocks, -1, self.head_dim))
        by_index = hidden_states.shape[1] == 1 and _is_eager_inference()
        [stored] = self.stored_pieces.take(blocks, 3, by_index)
        return stored.flatten(2, 3)

    def _heads(self, x: Tensor) -> Tensor:
        """``[b, s, heads * d]`` to ``[b, s, heads, d]``."""
        return x.unflatten(-1, (-1, self.head_dim))

    def _position(self, x: Tensor, norm: nn.Module | None, rotary: KV | None) -> Tensor:
        """Normalise and rotate: ``[b, s, heads, d]`` to ``[b, heads, s, d]``."""
        x = (x if norm is None else norm(x)).transpose(1, 2)
        return x if rotary is None else apply_rotary(x, *rotary, self.config.rotary_interleaved)
