"""Turn a layer or block spec that Megatron built into one with skip-layer attention, or with torch's core attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ..attention.core_attention import TorchAttention
from ..attention.numbering import LayerNumbers
from ..attention.self_attention import QUERY_KEY_VALUE, SLASelfAttention
from ..attention.sla_config import SLAConfig

Spec = ModuleSpec | TransformerBlockSubmodules


def sla_layer_spec(spec: Spec, sla: SLAConfig, numbers: LayerNumbers | None = None) -> Spec:
    """``spec`` with each layer's self-attention module swapped; everything else is shared, nothing is modified.

    What has skip-layer attention for the same ``sla`` stays as it is.

    Args:
        spec: a layer's ``ModuleSpec`` or a block's ``TransformerBlockSubmodules``: local, Transformer Engine or MoE.
        sla: what skip-layer attention means in this model.
        numbers: of a hybrid model, which layers of its stack are attention.

    Raises:
        ValueError: where a layer's self-attention is not upstream's ``SelfAttention`` (multi-latent attention, say).
        SeamError: if upstream's ``SelfAttention`` changed.
    """
    QUERY_KEY_VALUE.require()
    params: dict[str, Any] = {"sla": sla} if numbers is None else {"sla": sla, "numbers": numbers}
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=[_sla_layer(layer, params) for layer in spec.layer_specs])
    return _sla_layer(spec, params)


def _sla_layer(layer: ModuleSpec, params: dict[str, Any]) -> ModuleSpec:
    attention = getattr(layer.submodules, "self_attention", None)
    if getattr(attention, "module", None) is SLASelfAttention and attention.params.items() >= params.items():
        return layer
    if not isinstance(attention, ModuleSpec) or attention.module is not SelfAttention:
        found = attention.module if isinstance(attention, ModuleSpec) else attention
        raise ValueError(
            f"skip-layer attention replaces megatron.core.transformer.attention.SelfAttention; this layer spec has "
            f"{getattr(found, '__qualname__', found)} in its place"
        )
    sla_attention = replace(attention, module=SLASelfAttention, params={**attention.params, **params})
    return replace(layer, submodules=replace(layer.submodules, self_attention=sla_attention))


def torch_attention_spec(spec: Spec) -> Spec:
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


def torch_attention_in_further_layers(spec: MultiTokenPredictionBlockSubmodules) -> MultiTokenPredictionBlockSubmodules:
    """The same of the layers that predict further tokens: of the transformer layer in each of them."""

    def layer(one: ModuleSpec) -> ModuleSpec:
        inside = torch_attention_spec(one.submodules.mtp_model_layer)
        return replace(one, submodules=replace(one.submodules, mtp_model_layer=inside))

    return replace(spec, layer_specs=[layer(one) for one in spec.layer_specs])
