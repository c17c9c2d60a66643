"""Self-attention in which skip groups read the keys and values of an earlier layer.

Shapes: s sequence, b microbatch, h hidden, d head size; ``groups`` counts this tensor-parallel rank's groups only.

The one upstream method that changes is ``SelfAttention.get_query_key_value_tensors``: skip groups get the source
layer's K/V there, before anything downstream runs.  Rotary embedding, every core attention (local, Transformer Engine,
flash), its recomputation and the output projection are upstream's, called once a layer, and see ordinary K/V.

K is shared before rotary embedding and rotated by the reader.  That is the K that the source's own attention sees:
rotation depends on the position alone, and is the same in all layers; ``validation.py`` refuses per-layer patterns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank
from torch import Tensor

from .config import SLAConfig
from .microbatch_kv import current
from .roles import LayerRole


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
        self._pruned = sla.kv_projection == "pruned"
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
            query, key, value = self._project_live_groups(hidden_states)
            gate: tuple[Tensor, ...] = ()
        else:
            query, key, value, *gate = super().get_query_key_value_tensors(
                hidden_states, key_value_states, output_gate=output_gate, split_qkv=True
            )
        if self.role.reads_nothing_of_its_own and self.k_layernorm is not None:
            query = _KeepInGraph.apply(query, key)
        return (query, *self._exchange(key, value), *gate)

    def _exchange(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put what later layers read, take what this layer reads; key and value are ``[s, b, projected groups, d]``."""
        role = self.role
        if not role.puts and not role.takes:
            return key, value
        kv = current()
        own_keys, own_values = key.split(1, dim=2), value.split(1, dim=2)
        for name, positions in role.puts.items():
            # torch.cat copies: a view would keep the whole projection of the source layer alive until it is read.
            kv.put(name, tuple(torch.cat([own[i] for i in positions], dim=2) for own in (own_keys, own_values)))
        if not role.takes:
            return key, value
        pieces = {None: (own_keys, own_values)}
        for name in role.takes:
            pieces[name] = tuple(tensor.split(1, dim=2) for tensor in kv.take(name))
        return tuple(torch.cat([pieces[origin][which][i] for origin, i in role.read], dim=2) for which in (0, 1))

    def _project_live_groups(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Upstream's projection with the dead rows left out; a group's rows are ``q.. k v``, or ``q..`` where dead."""
        mixed_qkv, _ = self.linear_qkv(hidden_states)
        d = self.hidden_size_per_attention_head
        query_rows = d * self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        sizes, kinds = [], []
        for group in range(self.num_query_groups_per_partition):
            live = group in self.role.projected
            sizes += [query_rows, d, d] if live else [query_rows]
            kinds += "qkv" if live else "q"
        pieces = mixed_qkv.split(sizes, dim=-1)

        def heads(kind: str) -> Tensor:
            chosen = [piece for piece, its_kind in zip(pieces, kinds, strict=True) if its_kind == kind]
            rows = torch.cat(chosen, dim=-1) if chosen else mixed_qkv[..., :0]
            return rows.view(*rows.shape[:-1], rows.shape[-1] // d, d)

        query, key, value = heads("q"), heads("k"), heads("v")
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value


def _with_fewer_rows(linear_qkv: Any, rows: int) -> Any:
    """The builder ``linear_qkv``, called with an output size that is ``rows`` smaller."""

    def build(input_size: int, output_size: int, /, **kwargs: Any) -> torch.nn.Module:
        return linear_qkv(input_size, output_size - rows, **kwargs)

    return build
