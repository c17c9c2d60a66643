"""The spec of a hybrid model's stack that needs no Transformer Engine, which upstream does not have.

It is made of the parts of upstream's local GPT layer, so that ``"*-" * L`` is the local GPT of ``L`` layers.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from .hybrid_stack import NormedHybridStack

# Transformer Engine keeps a norm in the linear layer that follows it; a checkpoint has the names that it gives them,
# whichever spec wrote it.
_ATTENTION_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_MLP_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
_MAMBA_KEYS = {"norm.": "mixer.in_proj.layer_norm_"}

#: The kinds of layers that the local spec has.
LOCAL_KINDS = "*-EM"


def local_hybrid_stack_spec(config: TransformerConfig) -> ModuleSpec:
    """Of a stack of attention, MLP, expert and Mamba layers, for ``--transformer-impl local``."""
    dense = get_gpt_layer_local_submodules(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
    )
    with_experts = get_gpt_layer_local_submodules(
        # Of a model without experts no such layer is built; the parts are those of any number.
        num_experts=config.num_moe_experts or 1,
        moe_grouped_gemm=config.moe_grouped_gemm,
        normalization=config.normalization,
    )
    attention = TransformerLayerSubmodules(
        input_layernorm=dense.input_layernorm,
        self_attention=dense.self_attention,
        self_attn_bda=dense.self_attn_bda,
        sharded_state_dict_keys_map=_ATTENTION_KEYS,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=dense.pre_mlp_layernorm,
        mlp=dense.mlp,
        mlp_bda=dense.mlp_bda,
        sharded_state_dict_keys_map=_MLP_KEYS,
    )
    mixer = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    mamba = MambaLayerSubmodules(
        norm=dense.input_layernorm,
        mixer=ModuleSpec(MambaMixer, submodules=mixer),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=_MAMBA_KEYS,
    )
    return ModuleSpec(
        NormedHybridStack,
        # What a GPT's block with the local layer spec has.
        params={"final_norm": transformer_block.LayerNormImpl},
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(MambaLayer, submodules=mamba),
            attention_layer=ModuleSpec(TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(MLPLayer, submodules=mlp),
            moe_layer=ModuleSpec(MoETransformerLayer, submodules=replace(mlp, mlp=with_experts.mlp)),
        ),
    )
