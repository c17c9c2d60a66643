"""Self-attention in which skip groups read the keys and values of an earlier layer.

Shapes: s sequence, b microbatch, h hidden, d head size; ``groups`` counts this tensor-parallel rank's groups only.

The one upstream method that changes is ``SelfAttention.get_query_key_value_tensors``: skip groups get the source
layer's keys, values or both there, before anything downstream runs.  Rotary embedding, every core attention (local,
Transformer Engine, flash), its recomputation and the output projection are upstream's, called once a layer, and see
ordinary K/V.

K is shared before rotary embedding and rotated by the reader.  That is the K that the source's own attention sees:
rotation depends on the position alone, and ``flags/validation.py`` sees to it that both layers rotate, or neither.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank
from torch import Tensor

from ..pipeline.waiting import current
from ..upstream.seams import OneOf, Reliance
from .mixing import mix
from .mixing_plan import LayerPlan, OwnHeads, projection_plan
from .numbering import LayerNumbers
from .roles import LayerRole
from .sla_config import SLAConfig

_QUERY_KEY_VALUE = (
    "megatron.core.transformer.attention:SelfAttention.get_query_key_value_tensors",
    "overridden by SLASelfAttention, which takes the place of SelfAttention in the layer spec; its steps after the "
    "projection are spelled out",
)

QUERY_KEY_VALUE = OneOf(
    Reliance(
        *_QUERY_KEY_VALUE,
        ("self", "hidden_states", "key_value_states", "output_gate", "split_qkv"),
        sources={"53c73e30c0289e33": "0.19.0 to 0.19.2", "99d3f9539b11aafe": "main at d98e8a64"},
    ),
    # Since upstream's #4841: a gate for each head (flags/validation.py refuses it).
    Reliance(
        *_QUERY_KEY_VALUE,
        ("self", "hidden_states", "key_value_states", "output_gate", "head_wise_gate", "split_qkv"),
        sources={"f9ec1aabf083ecde": "dev at d48bd6be"},
    ),
)

#: Called with whatever it is given, so that no signature is assumed.
ROLE = Reliance(
    "megatron.core.transformer.attention:SelfAttention.__init__", "overridden by SLASelfAttention, to know its role"
)


class SLASelfAttention(SelfAttention):
    """Upstream's ``SelfAttention`` with skip groups.

    Args:
        sla: the model's skip-layer attention; the other arguments are upstream's.
        numbers: of a hybrid model, which layers of its stack are attention; in a GPT all are.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        sla: SLAConfig,
        numbers: LayerNumbers | None = None,
        **kwargs: Any,
    ) -> None:
        number = layer_number if numbers is None else numbers.among_attention(layer_number)
        pruned_away = 0
        if sla.kv_projection == "pruned":
            pruned_away = config.kv_channels * (2 * sla.num_query_groups - sla.num_live(number))
            submodules = replace(submodules, linear_qkv=_with_fewer_rows(submodules.linear_qkv, pruned_away))
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.linear_qkv_out_dim -= pruned_away
        self.role = LayerRole.of(sla, number, self.world_size, get_pg_rank(self.tp_group))
        # A layer that keeps all of its K/V has the dense one's projection.
        self._pruned = pruned_away > 0
        queries = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        self._projection, self._apart = OwnHeads.in_projection(self.role, queries), OwnHeads.apart(self.role)
        #: By whether the layer's own heads are in one projection, and by the pieces of what it reads of others.
        self._plans: dict[tuple[bool, Any], LayerPlan] = {}
        if not self.role.key.projected:
            # No key to normalise: the parameters would never get a gradient.
            self.k_layernorm = None

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
        *,
        head_wise_gate: bool = False,
    ) -> tuple[Tensor, ...]:
        """Query ``[s, b, heads, d]``, key and value ``[s, b, groups, d]`` with skip groups replaced, any gate.

        Raises ``RuntimeError`` outside of a microbatch, or where a source layer's K/V are missing.
        """
        if not split_qkv:
            raise RuntimeError("skip-layer attention needs query, key and value apart: no --fused-single-qkv-rope")
        if head_wise_gate:
            raise RuntimeError("skip-layer attention has no gate for each head: no --head-wise-attn-gate")
        has_role = bool(self.role.puts or self.role.takes)
        normalises = any(not isinstance(norm, IdentityOp | None) for norm in (self.q_layernorm, self.k_layernorm))
        if has_role and not (normalises or output_gate or self.config.test_mode):
            return self._mixed(self._projection, [self._heads_of_projection(hidden_states, key_value_states)])
        if self._pruned:
            query, own, gate = *self._normalised(hidden_states), []
        else:
            query, *own, gate = self._upstreams(hidden_states, key_value_states, output_gate)
        if not has_role:
            return (query, *own, *gate)
        key, value = self._mixed(self._apart, own)
        # Not as a view beside keys and values that are none of its projection: see ``_mixed``.
        return (query.contiguous() if self.role.takes else query, key, value, *gate)

    def _upstreams(self, hidden_states: Tensor, key_value_states: Tensor | None, output_gate: bool) -> tuple[Any, ...]:
        """Upstream's query, key, value, and a list with any gate."""
        query, key, value, *gate = super().get_query_key_value_tensors(
            hidden_states, key_value_states, output_gate=output_gate, split_qkv=True
        )
        return query, key, value, gate

    def _heads_of_projection(self, hidden_states: Tensor, key_value_states: Tensor | None = None) -> Tensor:
        """Upstream's projection, with dead rows left out or not, as ``[s, b, heads of all kinds, d]``."""
        if self._pruned:
            projected, _ = self.linear_qkv(hidden_states)
        else:
            projected, _ = super().get_query_key_value_tensors(hidden_states, key_value_states, split_qkv=False)
        return projected.reshape(*projected.shape[:2], -1, self.hidden_size_per_attention_head)

    def _normalised(self, hidden_states: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Query, and the keys and the values of live groups where there are any, after upstream's norms."""
        query, *own = mix(projection_plan(self._projection), [self._heads_of_projection(hidden_states)])
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None and self.role.key.projected:
            own[0] = self.k_layernorm(own[0])
        return query, own

    def _mixed(self, heads: OwnHeads, own: list[Tensor]) -> tuple[Tensor, ...]:
        """What attention reads, ``[s, b, heads, d]``: queries where they are among ``heads``, keys and values.

        Where other layers' K/V are read, each has memory of its own, the queries too.  That is correctness under
        Transformer Engine: its ``get_qkv_layout`` looks at the strides of keys and values alone, and would take a
        strided query beside contiguous ones for contiguous.

        Args:
            heads: where the layer's own are.
            own: its own tensors, whose heads those are.
        """
        held = current()
        taken_pieces = [held.take(shared) for shared in self.role.takes]
        taken = tuple(tuple(piece.shape[2] for piece in pieces) for pieces in taken_pieces)
        plan = self._plans.get((heads is self._projection, taken))
        if plan is None:
            # Offloading empties the memory of what core attention read, whatever else lies in it.
            plan = LayerPlan.of(self.role, heads, taken, may_be_views=not self.offload_core_attention)
            self._plans[heads is self._projection, taken] = plan
        outputs = iter(mix(plan.mixing, [*own, *chain(*taken_pieces)]))
        read = tuple(islice(outputs, 3 if heads.query else 2))
        for shared, count in plan.handed_on.items():
            held.put(shared, tuple(islice(outputs, count)))
        return read


def _with_fewer_rows(linear_qkv: Any, rows: int) -> Any:
    """The builder ``linear_qkv``, called with an output size that is ``rows`` smaller."""

    def build(input_size: int, output_size: int, /, **kwargs: Any) -> torch.nn.Module:
        return linear_qkv(input_size, output_size - rows, **kwargs)

    return build
