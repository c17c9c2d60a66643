"""How many parameters a model has, from its configuration alone, without building it.

Legend: ``h`` hidden size, ``d`` head size, ``H`` query heads, ``G`` K/V groups, ``f`` inner size of an MLP.
"""

from __future__ import annotations

from typing import Any

from ..common.patterns import ATTENTION, EXPERTS, MAMBA, MLP, kinds
from .weights import mlp_parameters, of_kinds


class Uncounted(ValueError):
    """Why the parameters of a model are not counted, as one line."""


def model_parameters(model: Any) -> int:
    """Parameters of the whole model; all of its experts, no padding but the vocabulary's.

    Args:
        model: a ``GPTModelConfig`` or ``HybridModelConfig``, of Megatron's or with ``sla``.

    Raises:
        Uncounted: for a model that is not counted here.
    """
    config = model.transformer
    if config.multi_latent_attention:
        raise Uncounted("parameters are not estimated with multi-latent attention")
    hidden = config.hidden_size
    rows = model.vocab_size
    if model.should_pad_vocab:
        multiple = model.make_vocab_size_divisible_by * config.tensor_model_parallel_size
        rows = -(-rows // multiple) * multiple
    count = rows * hidden * (1 if model.share_embeddings_and_output_weights else 2)
    if model.position_embedding_type == "learned_absolute":
        count += model.seq_length * hidden
    pattern = getattr(model, "hybrid_layer_pattern", None)
    count += _gpt_layers(config) if pattern is None else _hybrid_layers(config, kinds(pattern))
    left_out = pruned_parameters(model) if getattr(model, "sla", None) is not None else 0
    return count + _norm_width(config) * hidden - left_out


def pruned_parameters(model: Any) -> int:
    """How many parameters ``pruned`` leaves out of the dense model: rows of K and V, their biases, unused key norms."""
    sla, transformer = model.sla, model.transformer
    if sla is None or sla.kv_projection != "pruned":
        return 0
    per_row = transformer.hidden_size + int(transformer.add_bias_linear or transformer.add_qkv_bias)
    norm = 0
    if transformer.qk_layernorm and not transformer.qk_l2_norm:
        norm = transformer.kv_channels * (2 if transformer.normalization == "LayerNorm" else 1)
    return sla.dead_parameters(transformer.kv_channels, per_row, norm)


def _gpt_layers(config: Any) -> int:
    hidden, norm = config.hidden_size, _norm_width(config)
    count = sum(mlp_parameters(config, layer) for layer in range(config.num_layers))
    count += config.num_layers * (_attention(config) + 2 * norm * hidden)
    if config.mtp_num_layers:
        # Each has the kind of the last layer, norms of the hidden state, the embedding and the result, and a matrix
        # that joins the first two.
        further = _attention(config) + mlp_parameters(config, config.num_layers - 1) + 5 * norm * hidden
        count += (further + 2 * hidden * hidden) * (1 if config.mtp_use_repeated_layer else config.mtp_num_layers)
    return count


def _hybrid_layers(config: Any, layers: str) -> int:
    """Each layer is of one kind, behind one norm."""
    if "G" in layers:
        raise Uncounted("parameters are not estimated with gated delta networks")
    config = of_kinds(config, layers)
    count = len(layers) * _norm_width(config) * config.hidden_size
    count += layers.count(ATTENTION) * _attention(config) + layers.count(MAMBA) * _mamba(config)
    return count + sum(mlp_parameters(config, layer) for layer, kind in enumerate(layers) if kind in (MLP, EXPERTS))


def _attention(config: Any) -> int:
    hidden, head, heads = config.hidden_size, config.kv_channels, config.num_attention_heads
    groups = config.num_query_groups or heads
    gated = 2 if getattr(config, "attention_output_gate", False) else 1
    qkv = head * (gated * heads + 2 * groups)
    count = hidden * qkv + heads * head * hidden
    count += qkv * int(config.add_bias_linear or config.add_qkv_bias) + hidden * int(config.add_bias_linear)
    if config.qk_layernorm and not config.qk_l2_norm:
        count += 2 * head * _norm_width(config)
    return count


def _mamba(config: Any) -> int:
    """Projections in and out, a convolution of four tokens, a norm, and three numbers a head."""
    hidden, state = config.hidden_size, 2 * config.mamba_num_groups * config.mamba_state_dim
    heads = config.mamba_num_heads or 2 * hidden // config.mamba_head_dim
    inner = heads * config.mamba_head_dim
    return hidden * (2 * inner + state + heads) + 5 * (inner + state) + 3 * heads + inner + inner * hidden


def _norm_width(config: Any) -> int:
    return 2 if config.normalization == "LayerNorm" else 1
