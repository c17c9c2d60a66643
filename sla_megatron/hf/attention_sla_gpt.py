"""SLA-GPT's attention, and the norm that it needs.

Shapes: b batch, s new tokens, S all tokens (past and new), h hidden, d head size, H query heads, G key/value groups,
N groups of which a layer keeps keys, or values (live ones, in the configuration's stored order; keys and values have
each their own N), R blocks of groups that do the same in every layer (the configuration's ``G / period``).

This file goes into exported folders: it needs torch, transformers and the other ``*_sla_gpt.py`` files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .cache_sla_gpt import Own, cached
from .configuration_sla_gpt import SlaGPTConfig
from .pieces_sla_gpt import LiveRows, Pieces, is_eager_inference
from .reads_sla_gpt import Reads, kept_at, parts_of
from .rotary_sla_gpt import apply_rotary
from .sharing_sla_gpt import KINDS

#: What a layer reads of keys, and of values: tensors of earlier layers, and its own the last.
Stores = tuple[list[Tensor], list[Tensor]]

#: Bytes of keys and values up to which they are copied for one token, rather than read where they are.
MOST_COPIED = 512 * 1024


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
        weight = self.weight
        shape = weight.shape
        if not self.zero_centered and x.dtype == weight.dtype:
            # torch's own have fp32 inside, and are one operation each where there is a kernel.
            if self.bias is None:
                return nn.functional.rms_norm(x, shape, weight, self.eps)
            return nn.functional.layer_norm(x, shape, weight, self.bias, self.eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Added in fp32: in bf16, 1 + weight would lose most of the weight.
        weight = weight.to(dtype) + 1 if self.zero_centered else weight.to(dtype)
        wide = x.to(dtype)
        if self.bias is not None:
            return nn.functional.layer_norm(wide, shape, weight, self.bias.to(dtype), self.eps).to(x.dtype)
        return nn.functional.rms_norm(wide, shape, weight, self.eps).to(x.dtype)


# Attention.


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
    # In the shape that is returned before they are used: their gradients are asked for.
    weights = nn.functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype).flatten(1, 2)
    output = (weights.unflatten(1, (key.shape[1], -1)) @ value.unsqueeze(2)).flatten(1, 2)
    return output.transpose(1, 2).contiguous(), weights


class SlaGPTAttention(nn.Module):
    """Self-attention that reads its own K/V and those of earlier layers.

    With tensor parallelism each rank has the heads of some of the blocks: how many is seen from the tensors.
    """

    is_causal = True

    def __init__(self, config: SlaGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = d = config.head_dim
        self.num_key_value_groups = per_group = config.num_attention_heads // config.num_key_value_heads
        self.scaling = d**-0.5
        # What each token needs of the configuration: transformers' own takes its time to find a field.
        self.is_interleaved = config.rotary_interleaved

        # The configuration counts layers from 1.
        number, period = layer_idx + 1, config.period
        blocks = config.num_key_value_heads // period
        #: Of keys and of values.
        self.reads = tuple(Reads(config, number, kind) for kind in KINDS)
        earlier = sorted({a for reads in self.reads for a in reads.source_layers})
        #: The tensors of earlier layers that are read: layer, counted from 1, and index of the kind.
        self.sources = [(a, kind) for a in earlier for kind in (0, 1) if a in self.reads[kind].source_layers]
        #: Query heads of a block.
        self.heads_in_block = period * per_group
        #: What a call for each part takes, and of one block where its queries and outputs go among the heads.
        self.parts = parts_of(config, number)
        self.query_pieces = Pieces([part.groups for part in self.parts or []] or [[0]], period, per_group)
        #: Where at most half of the groups are read, the rows of those that are, of the kinds that this is true of.
        self.live_rows: LiveRows | None = None
        self.gathered = self._gathered(period)
        if self.gathered:
            reads = self.reads[self.gathered[0]]
            order = [block * reads.projected_in_block + place for block in range(blocks) for place in reads.stored]
            self.live_rows = LiveRows([group * d + i for group in order for i in range(d)])

        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * d, bias=bias)
        rows = [blocks * reads.projected_in_block * d for reads in self.reads]
        self.k_proj = nn.Linear(config.hidden_size, rows[0], bias=bias) if rows[0] else None
        self.v_proj = nn.Linear(config.hidden_size, rows[1], bias=bias) if rows[1] else None
        self.o_proj = nn.Linear(config.num_attention_heads * d, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = SlaGPTNorm(config, d) if config.qk_layernorm else None
        self.k_norm = SlaGPTNorm(config, d) if config.qk_layernorm and self.k_proj is not None else None

    def _gathered(self, period: int) -> list[int]:
        """The kinds whose live rows are put together: both alike, or one that has other rows too."""
        kinds = [kind for kind, reads in enumerate(self.reads) if 0 < 2 * len(reads.stored) <= period]
        has_others = any(len(self.reads[kind].stored) < self.reads[kind].projected_in_block for kind in kinds)
        return kinds if len(kinds) == 2 or has_others else []

    def forward(
        self,
        hidden_states: Tensor,
        sources: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None, Own]:
        """Attend.

        Args:
            hidden_states: ``[b, s, h]``.
            sources: the keys, or values, that earlier layers keep and this one reads, ``[b, N, S, d]`` each, in the
                order of ``self.sources``.
            rotary: cosine and sine, each ``[b or 1, s, 1, rotary_dim]``.

        Returns:
            the output ``[b, s, h]``; the weights ``[b, H, s, S]`` where the implementation gives them; the layer's own
            keys and values, ``[b, N, S, d]`` each, ``None`` where nothing reads them.
        """
        query, *own = self._project(hidden_states, rotary)
        if past_key_values is not None and (own[0] is not None or own[1] is not None):
            own = cached(past_key_values, own, self.layer_idx)
        if len(sources) != len(self.sources):
            wanted = [f"{KINDS[kind]}s of layer {a}" for a, kind in self.sources]
            raise ValueError(
                f"layer {self.layer_idx + 1} reads {', '.join(wanted)}, of which it was given {len(sources)}: pipeline "
                "stages cannot be cut between them"
            )
        stores: Stores = ([], [])
        for (_, kind), source in zip(self.sources, sources, strict=True):
            stores[kind].append(source.to(query.device))
        for kind, reads in enumerate(self.reads):
            if reads.reads_own:
                stores[kind].append(own[kind])

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self._is_in_parts(query, stores, past_key_values, kwargs):
            attend_to_part = partial(attend, self, dropout=0.0, scaling=self.scaling, **kwargs)
            output, weights = self._attend_to_parts(attend_to_part, query, stores, attention_mask)
        else:
            key, value = (reads.joined(tensors) for reads, tensors in zip(self.reads, stores, strict=True))
            # vLLM looks for this call in the text of this function: one, to a name that was looked up above.
            output, weights = attend(
                self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
            )
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1)), weights, tuple(own)

    def _is_in_parts(
        self, query: Tensor, stores: Stores, past_key_values: Cache | None, kwargs: dict[str, Any]
    ) -> bool:
        """Whether attention takes a call for each part of what is read, on views of its keys and values.

        For a single token behind a long cache of ours alone.  An engine has a cache for each layer, behind the
        attention interface, and there all groups' keys and values go in one call a layer: no cache comes with the
        layer's arguments, or (continuous batching) it is one of the interface's.  Flex attention would compile a kernel
        for every number of groups.  And weights that were put together would lie beside the way of the gradients.
        """
        if past_key_values is None or kwargs.get("cache") is not None:
            return False
        if query.shape[2] > 1 or all(reads.pieces.is_identity for reads in self.reads) or self.parts is None:
            return False
        if torch.is_grad_enabled() or self.config._attn_implementation == "flex_attention":
            return False
        return not self._is_short(query, stores[0][0])

    def _is_short(self, query: Tensor, key: Tensor) -> bool:
        """Whether one token's attention takes one call, on copies of the keys and values of ``key``'s ``[b, N, S, d]``.

        Counted: two copies and a call, or as many calls as layers are read and a copy of their outputs, so the same for
        two layers; the former writes all of G, S and d, the latter reads the cache alone.  Measured, one thread of a
        processor, microseconds, (KiB that are copied: one call, two):

        - 12 heads of 8:  (96: 48, 60)  (192: 60, 70)  (384: 82, 84)  (768: 125, 117)
        - 12 heads of 64: (96: 47, 59)  (384: 72, 72)  (768: 94, 89)  (3072: 220, 152)
        - the same in 4 groups: (128: 44, 75)  (512: 93, 113)  (1024: 141, 148)  (2048: 254, 238)

        Where groups are torn apart, putting them in their order takes one call longer at every length: 77 and 57 with
        16 tokens.
        """
        groups = query.shape[1] // self.num_key_value_groups
        copied = 2 * key.shape[0] * key.shape[2] * groups * self.head_dim * key.element_size()
        return copied <= MOST_COPIED and not any(reads.pieces.is_torn for reads in self.reads)

    def _attend_to_parts(
        self, attend: Callable, query: Tensor, stores: Stores, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One call for each part, on views of its keys and values: blocks become part of the batch.

        For a single token, whose time is mostly that of reading the cache: copying a long one would double that.
        """
        batch, by_index = query.shape[0], is_eager_inference()
        query = query.reshape(-1, self.heads_in_block, *query.shape[2:])
        queries = self.query_pieces.take(query, 1, by_index)
        if mask is not None:
            mask = mask.repeat_interleave(query.shape[0] // batch, dim=0)
        results = []
        for heads, part in zip(queries, self.parts, strict=True):
            places = (part.key, part.value)
            key, value = (kept_at(stores[kind][place.store], place) for kind, place in enumerate(places))
            results.append(attend(heads, key, value, mask))
        output = self.query_pieces.put_back([result[0] for result in results], 2, by_index)
        if results[0][1] is None:
            return output, None
        weights = self.query_pieces.put_back([result[1] for result in results], 1, by_index)
        return output, weights.reshape(batch, -1, *weights.shape[2:])

    def _project(
        self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The queries ``[b, H, s, d]``, and keys and values that some layer reads, ``[b, N, s, d]`` in stored order."""
        query = self.q_proj(hidden_states)
        if query.shape[-1] % (self.heads_in_block * self.head_dim):
            config = self.config
            raise ValueError(
                f"{query.shape[-1] / self.head_dim:g} of {config.num_attention_heads} heads are on this rank, but only "
                f"blocks of {self.heads_in_block}, after which their sources repeat, can be split: the "
                f"tensor-parallel size must divide {config.num_key_value_heads // config.period}"
            )
        query = self._heads(query)
        query = query if self.q_norm is None else self.q_norm(query)
        key, value = self._project_kv(hidden_states)
        key = key if key is None or self.k_norm is None else self.k_norm(key)
        if rotary is not None:
            query, key = self._rotate(query, key, rotary)
        key, value = (x if x is None else x.transpose(1, 2) for x in (key, value))
        return query.transpose(1, 2), key, value

    def _project_kv(self, hidden_states: Tensor) -> list[Tensor | None]:
        """``[b, s, N, d]`` each; ``None`` where nothing reads it."""
        linears, found = (self.k_proj, self.v_proj), [None, None]
        if self.live_rows is not None:
            gathered = [linears[kind] for kind in self.gathered]
            if is_eager_inference() and all(map(_is_plain, gathered)):
                weight, bias = self.live_rows.of(gathered, afresh=hidden_states.shape[1] > 1)
                together = self._heads(nn.functional.linear(hidden_states, weight, bias))
                for kind, part in zip(self.gathered, together.chunk(len(gathered), dim=2), strict=True):
                    found[kind] = part
            elif not torch.compiler.is_compiling():
                self.live_rows.drop()
        for kind, reads in enumerate(self.reads):
            if found[kind] is None and reads.stored_pieces is not None:
                found[kind] = self._live(self._heads(linears[kind](hidden_states)), reads)
        return found

    def _live(self, x: Tensor, reads: Reads) -> Tensor:
        """``[b, s, P, d]`` of all P groups that there are weights for, to ``[b, s, N, d]`` of those that are kept."""
        if reads.stored_pieces.is_identity:
            return x
        by_index = x.shape[1] == 1 and is_eager_inference()
        blocks = x.unflatten(2, (-1, reads.projected_in_block))
        return reads.stored_pieces.take(blocks, 3, by_index)[0].flatten(2, 3)

    def _rotate(self, query: Tensor, key: Tensor | None, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Both turned, ``[b, s, heads, d]``."""
        interleaved = self.is_interleaved
        if key is None:
            return apply_rotary(query, *rotary, interleaved), None
        if query.shape[1] == 1 and is_eager_inference():
            # Of one token, the time is that of starting operations: together, half as many, and one more.
            both = apply_rotary(torch.cat((query, key), dim=2), *rotary, interleaved)
            return both.split_with_sizes([query.shape[2], key.shape[2]], dim=2)
        return apply_rotary(query, *rotary, interleaved), apply_rotary(key, *rotary, interleaved)

    def _heads(self, x: Tensor) -> Tensor:
        """``[b, s, heads * d]`` to ``[b, s, heads, d]``."""
        return x.unflatten(-1, (-1, self.head_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """``to``, ``half`` and their like: not to hold the old memory until the next token."""
        if self.live_rows is not None:
            self.live_rows.drop()
        return super()._apply(fn, recurse)
