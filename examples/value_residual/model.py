"""A value residual: layer 1 hands over its values, and each later layer adds them to its own.

After "Value Residual Learning", arXiv 2410.17897.  It has nothing of skip-layer attention but what carries its tensors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from sla_megatron.model.transformer_block import cross_layer_blocks
from sla_megatron.pipeline.declarations import CrossLayerTensor, Declarations
from sla_megatron.pipeline.waiting import hand_over, receive


class ValueResidual(SelfAttention):
    """Megatron's self-attention, with layer 1's values added to those of each later layer."""

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        query, key, value, *gate = super().get_query_key_value_tensors(*args, **kwargs)
        if self.layer_number == 1:
            hand_over("first values", value)
        else:
            value = value + receive("first values")
        return query, key, value, *gate


def with_value_residual(layer: ModuleSpec) -> ModuleSpec:
    """The layer spec that Megatron made, with :class:`ValueResidual` in it."""
    attention = replace(layer.submodules.self_attention, module=ValueResidual)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


def value_residual(config: TransformerConfig) -> AbstractContextManager[None]:
    """Within it Megatron's GPTs have a value residual."""
    size, layers = config.tensor_model_parallel_size, config.num_layers
    first = CrossLayerTensor(
        "first values",
        source=1,
        readers=tuple(range(2, layers + 1)),
        widths=(config.num_query_groups // size,) * size,
        unit=config.kv_channels,
    )
    return cross_layer_blocks(Declarations(layers, (first,)), layer_spec=with_value_residual)
