"""Turn a layer or block spec that Megatron built into its skip-layer version."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ..attention.self_attention import SLASelfAttention
from ..attention.sla_config import SLAConfig
from ..upstream.seams import Reliance

QUERY_KEY_VALUE = Reliance(
    "megatron.core.transformer.attention:SelfAttention.get_query_key_value_tensors",
    "overridden by SLASelfAttention, which takes the place of SelfAttention in the layer spec",
    ("self", "hidden_states", "key_value_states", "output_gate", "split_qkv"),
)


def sla_layer_spec(
    spec: ModuleSpec | TransformerBlockSubmodules, sla: SLAConfig
) -> ModuleSpec | TransformerBlockSubmodules:
    """``spec`` with each layer's self-attention module swapped; everything else is shared, nothing is modified.

    Args:
        spec: a layer's ``ModuleSpec`` or a block's ``TransformerBlockSubmodules``: local, Transformer Engine or MoE.
        sla: what skip-layer attention means in this model.

    Raises:
        ValueError: where a layer's self-attention is not upstream's ``SelfAttention`` (multi-latent attention, say).
        SeamError: if upstream's ``SelfAttention`` changed.
    """
    QUERY_KEY_VALUE.require()
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=[_sla_layer(layer, sla) for layer in spec.layer_specs])
    return _sla_layer(spec, sla)


def _sla_layer(layer: ModuleSpec, sla: SLAConfig) -> ModuleSpec:
    attention = getattr(layer.submodules, "self_attention", None)
    if not isinstance(attention, ModuleSpec) or attention.module is not SelfAttention:
        found = attention.module if isinstance(attention, ModuleSpec) else attention
        raise ValueError(
            f"skip-layer attention replaces megatron.core.transformer.attention.SelfAttention; this layer spec has "
            f"{getattr(found, '__qualname__', found)} in its place"
        )
    sla_attention = replace(attention, module=SLASelfAttention, params={**attention.params, "sla": sla})
    return replace(layer, submodules=replace(layer.submodules, self_attention=sla_attention))
