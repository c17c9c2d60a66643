"""Self-attention in which skip groups read the keys and values of an earlier layer.

Shapes: s sequence, b microbatch, h hidden, d head size; ``groups`` counts this tensor-parallel rank's groups only.

The one upstream method that changes is ``SelfAttention.get_query_key_value_tensors``: skip groups get the source
layer's K/V there, before anything downstream runs.  Rotary embedding, every core attention (local, Transformer Engine,
flash), its recomputation and the output projection are upstream's, called once a layer, and see ordinary K/V.

K is shared before rotary embedding and rotated by the reader.  That is the K that the source's own attention sees:
rotation depends on the position alone, and is the same in all layers; ``flags/validation.py`` refuses other patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank
from torch import Tensor

from ..upstream.seams import Reliance
from .microbatch_kv import Bundle, current
from .pieces import Pieces
from .roles import BundleName, LayerRole
from .sla_config import SLAConfig

QUERY_KEY_VALUE = Reliance(
    "megatron.core.transformer.attention:SelfAttention.get_query_key_value_tensors",
    "overridden by SLASelfAttention, which takes the place of SelfAttention in the layer spec; for pruned projections "
    "its steps after the projection are spelled out",
    ("self", "hidden_states", "key_value_states", "output_gate", "split_qkv"),
    sources={"53c73e30c0289e33": "0.19.0 to 0.19.2", "99d3f9539b11aafe": "main at d98e8a64"},
)

#: Called with whatever it is given, so that no signature is assumed.
ROLE = Reliance(
    "megatron.core.transformer.attention:SelfAttention.__init__", "overridden by SLASelfAttention, to know its role"
)


class _KeepInGraph(torch.autograd.Function):
    """Returns ``kept_for``, and in backward gives ``unused`` a gradient of zeros.

    A parameter must get a gradient in every step: Megatron's data-parallel overlap waits for each one.  The key
    normalisation of a layer whose keys nobody on this rank reads (``--sla-kv-projection full``) would get none.
    """

    @staticmethod
    def forward(ctx: Any, kept_for: Tensor, unused: Tensor) -> Tensor:
        ctx.unused = (unused.shape, unused.dtype, unused.device)
        return kept_for.view_as(kept_for)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.unused
        return grad, torch.zeros(shape, dtype=dtype, device=device)


class _Share(torch.autograd.Function):
    """Returns ``tensor``, and views of those of its pieces, ``[s, b, groups, d]`` each, that later layers read.

    What autograd itself would do with views of views is to fill each piece that nobody reads with zeros, put all pieces
    together, and add that to the gradient of ``tensor``: some five passes over it.  This makes the sum in one.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: Sequence[int], shared: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.shared = list(sizes), shared
        pieces = tensor.split(ctx.sizes, dim=2)
        return tensor.view_as(tensor), *(pieces[i] for i in shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *of_shared: Tensor) -> tuple[Tensor, None, None]:
        given = dict(zip(ctx.shared, of_shared, strict=True))
        whole = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        for i, (own, out) in enumerate(zip(grad.split(ctx.sizes, 2), whole.split(ctx.sizes, 2), strict=True)):
            if i in given:
                torch.add(own, given[i], out=out)
            else:
                out.copy_(own)
        return whole, None, None


class SLASelfAttention(SelfAttention):
    """Upstream's ``SelfAttention`` with skip groups.

    Args:
        sla: the model's skip-layer attention; the other arguments are upstream's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        sla: SLAConfig,
        **kwargs: Any,
    ) -> None:
        pruned_away = 0
        if sla.kv_projection == "pruned":
            pruned_away = 2 * config.kv_channels * (sla.num_query_groups - len(sla.live_groups(layer_number)))
            submodules = replace(submodules, linear_qkv=_with_fewer_rows(submodules.linear_qkv, pruned_away))
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.linear_qkv_out_dim -= pruned_away
        self.role = LayerRole.of(sla, layer_number, self.world_size, get_pg_rank(self.tp_group))
        # A layer that keeps all of its K/V has the dense one's projection.
        self._pruned = pruned_away > 0
        self._pieces = Pieces.of(self.role, merged=not self._pruned)
        if not self.role.projected:
            # No key to normalise: the parameters would never get a gradient.
            self.k_layernorm = None

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, ...]:
        """Query ``[s, b, heads, d]``, key and value ``[s, b, groups, d]`` with skip groups replaced, any gate.

        Raises ``RuntimeError`` outside of a microbatch, or where a source layer's K/V are missing.
        """
        if not split_qkv:
            raise RuntimeError("skip-layer attention needs query, key and value apart: no --fused-single-qkv-rope")
        if self._pruned:
            return self._of_live_groups(hidden_states)
        query, key, value, *gate = super().get_query_key_value_tensors(
            hidden_states, key_value_states, output_gate=output_gate, split_qkv=True
        )
        if self.role.puts and not self.role.takes:
            key, value = self._share(key, value)
        if self.role.takes:
            own_keys, own_values = (tensor.split(self._pieces.own_sizes, dim=2) for tensor in (key, value))
            self._put(own_keys, own_values)
            if self.role.reads_nothing_of_its_own and self.k_layernorm is not None:
                query = _KeepInGraph.apply(query, key)
            key, value = self._read(own_keys, own_values)
            # As a view it would keep the whole projection alive beside them.
            query = query.contiguous()
        return (query, key, value, *gate)

    def _share(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Hand on what later layers read of this one, which reads all of it too; key and value as they were.

        What is handed on are views of the projection, which autograd keeps anyway for this layer's own attention.
        """
        shared = sorted(i for indices in self._pieces.put_pieces.values() for i in indices)
        key, *of_key = _Share.apply(key, self._pieces.own_sizes, shared)
        value, *of_value = _Share.apply(value, self._pieces.own_sizes, shared)
        own_keys, own_values = (dict(zip(shared, pieces, strict=True)) for pieces in (of_key, of_value))
        for name, indices in self._pieces.put_pieces.items():
            current().put(name, Bundle(*([own[i] for i in indices] for own in (own_keys, own_values))))
        return key, value

    def _put(self, own_keys: Sequence[Tensor], own_values: Sequence[Tensor]) -> None:
        """Hand on what later layers read, of this layer's pieces ``[s, b, groups, d]``, where it reads a mixture.

        Copies: views would keep the projection alive, which this layer's own attention does not.
        """
        for name, indices in self._pieces.put_pieces.items():
            whole = ([torch.cat([own[i] for i in indices], dim=2)] for own in (own_keys, own_values))
            current().put(name, Bundle(*whole))

    def _read(self, own_keys: Sequence[Tensor], own_values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Key and value ``[s, b, groups, d]`` of all groups: own pieces and those of earlier layers, in one copy."""
        kv = current()
        bundles: dict[BundleName | None, Bundle] = {None: Bundle(own_keys, own_values)}
        for name, sizes in self._pieces.taken_sizes.items():
            bundles[name] = kv.take(name).cut(sizes)
        key = torch.cat([bundles[origin].keys[i] for origin, i in self._pieces.read_pieces], dim=2)
        value = torch.cat([bundles[origin].values[i] for origin, i in self._pieces.read_pieces], dim=2)
        return key, value

    def _of_live_groups(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Upstream's projection with the dead rows left out; a group's rows are ``q.. k v``, or ``q..`` where dead."""
        mixed_qkv, _ = self.linear_qkv(hidden_states)
        d = self.hidden_size_per_attention_head
        query_rows = d * self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        sizes, kinds = [], []
        for group in range(self.num_query_groups_per_partition):
            if kinds[-1:] == ["q"]:
                # The queries of a dead group and of the next one are one piece.
                sizes[-1] += query_rows
            else:
                sizes.append(query_rows)
                kinds.append("q")
            if group in self.role.projected:
                sizes += [d, d]
                kinds += "kv"
        rows: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for piece, kind in zip(mixed_qkv.split(sizes, dim=-1), kinds, strict=True):
            rows[kind].append(piece)

        query = torch.cat(rows["q"], dim=-1).unflatten(-1, (-1, d))
        own_keys, own_values = ([piece.unsqueeze(2) for piece in rows[kind]] for kind in "kv")
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None and own_keys:
            own_keys = self.k_layernorm(torch.cat(own_keys, dim=2)).split(1, dim=2)
        self._put(own_keys, own_values)
        return (query, *self._read(own_keys, own_values))


def _with_fewer_rows(linear_qkv: Any, rows: int) -> Any:
    """The builder ``linear_qkv``, called with an output size that is ``rows`` smaller."""

    def build(input_size: int, output_size: int, /, **kwargs: Any) -> torch.nn.Module:
        return linear_qkv(input_size, output_size - rows, **kwargs)

    return build
