"""How many parameters the job's model has, and how large a checkpoint of it is, without building it.

Legend: ``h`` hidden size, ``d`` head size, ``H`` query heads, ``G`` K/V groups, ``f`` inner size of an MLP.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

from ...common.patterns import ATTENTION, EXPERTS, MAMBA, MLP, kinds
from .finding import Skipped

#: Bytes of an element, by the type's name.
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


def parameter_count(args: Namespace, vocabulary: int | None) -> int:
    """Parameters of the whole model; all of its experts, no padding but the vocabulary's.

    Args:
        args: validated; call where Megatron may be imported.
        vocabulary: tokens of the tokenizer; None takes what the flags say.

    Raises:
        Skipped: for a model that is not counted here.
    """
    from ...model.report import pruned_parameters

    model = model_config(args, vocabulary)
    config = model.transformer
    if config.multi_latent_attention:
        raise Skipped("parameters are not estimated with multi-latent attention")
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


def _gpt_layers(config: Any) -> int:
    from ...model.weights import mlp_parameters

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
    from ...model.weights import mlp_parameters, of_kinds

    if "G" in layers:
        raise Skipped("parameters are not estimated with gated delta networks")
    config = of_kinds(config, layers)
    count = len(layers) * _norm_width(config) * config.hidden_size
    count += layers.count(ATTENTION) * _attention(config) + layers.count(MAMBA) * _mamba(config)
    return count + sum(mlp_parameters(config, layer) for layer, kind in enumerate(layers) if kind in (MLP, EXPERTS))


def model_config(args: Namespace, vocabulary: int | None) -> Any:
    """The job's model, as its own configuration describes it."""
    from ...model.builder import model_config_from_args

    args = copy.copy(args)
    if args.padded_vocab_size is None and vocabulary is not None:
        args.vocab_size = vocabulary
    if args.padded_vocab_size is None and args.vocab_size is None:
        raise Skipped("the size of the vocabulary is not known")
    return model_config_from_args(args)


def checkpoint_bytes(args: Namespace, parameters: int) -> int:
    """Bytes of a checkpoint of ``parameters``: weights, and what the optimizer keeps for each."""
    return parameters * (args.params_dtype.itemsize + _optimizer_bytes(args))


def _optimizer_bytes(args: Namespace) -> int:
    """What an optimizer's state holds for a parameter: Adam's two moments or a momentum, and a master weight."""
    if args.no_save_optim:
        return 0
    moments = {"sgd": ("exp_avg_dtype",)}.get(args.optimizer, ("exp_avg_dtype", "exp_avg_sq_dtype"))
    state = sum(_width(getattr(args, name, None)) for name in moments)
    has_master = args.params_dtype.itemsize < 4 or args.use_distributed_optimizer
    return state + (_width(getattr(args, "main_params_dtype", None)) if has_master else 0)


def _width(dtype: Any) -> int:
    if hasattr(dtype, "itemsize"):
        return dtype.itemsize
    return _BYTES.get(str(dtype), 4)


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
