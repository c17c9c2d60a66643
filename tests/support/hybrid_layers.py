"""A layer for the place of Mamba's, whose kernels are not here, and the stack of a hybrid model that has it.

``--spec tests.support.hybrid_layers STACK`` trains with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from sla_megatron.model.hybrid_specs import local_hybrid_stack_spec


class MeanSoFar(torch.nn.Module):
    """Adds, to each position, a multiple of the mean of those up to it.

    With the arguments of ``MambaLayer``, and as there a tensor as its result, none of a ``TransformerLayer``'s pair.
    """

    def __init__(self, config: Any, layer_number: int, pg_collection: Any, pp_layer_offset: int, name: str) -> None:
        super().__init__()
        self.config, self.layer_number = config, layer_number
        self.weight = torch.nn.Parameter(torch.full((config.hidden_size,), 0.5))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | None = None,
        *,
        inference_params: Any = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """``[s, b, h]``."""
        count = torch.arange(1, hidden_states.shape[0] + 1, device=hidden_states.device).view(-1, 1, 1)
        return hidden_states + self.weight * hidden_states.cumsum(0) / count

    def sharded_state_dict(self, prefix: str, sharded_offsets: Any, metadata: dict[str, Any]) -> dict[str, Any]:
        """As upstream's modules have it."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


def with_mean(config: TransformerConfig) -> ModuleSpec:
    """The local stack, whose ``M`` is :class:`MeanSoFar`."""
    spec = local_hybrid_stack_spec(config)
    return replace(spec, submodules=replace(spec.submodules, mamba_layer=ModuleSpec(MeanSoFar)))


STACK = with_mean(TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1))
