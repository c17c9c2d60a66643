"""Between Megatron's arguments and the fields of ``config.json``.  Pure Python.

The exported folder is described by the checkpoint's own arguments; no reference model is asked.  What the format cannot
say is refused by name: an export that computes something else would be worse than none.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ...attention.sla_config import SLAConfig, compact_ranges
from ...common.errors import flag_of
from ...common.patterns import kinds
from ...flags.asked import hybrid_pattern
from ...flags.skipping import num_query_groups, sla_config_from_args
from .errors import ConvertError

Config = dict[str, Any]

# What --use-rope-scaling computes: constants of Megatron's, and a factor, to which its models come built with this one.
_LLAMA3: Config = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Of a hybrid model: what an export has no tensors for.
_OTHER_KINDS = {
    "M": "Mamba layers",
    "G": "gated delta nets",
    "D": "sparse attention",
    "+": "latent attention",
    "E": "experts",
    "/": "layers that predict further tokens",
}

# Megatron builds the rotary embedding of a hybrid model without them.
_NOT_IN_HYBRIDS = ("use_rope_scaling", "rotary_interleaved")

#: The format's ``model_type``.
MODEL_TYPE = "sla_gpt"


def config_from_args(args: Namespace, vocab_size: int) -> Config:
    """The fields of ``config.json`` for a checkpoint's arguments.

    Args:
        args: as Megatron stored them, validated, and as ``stored_arguments.completed`` leaves them.
        vocab_size: rows of the vocabulary that are not padding.

    Raises:
        ConvertError: for a value of a mapped option that the format cannot say; of other options see
            ``stored_arguments.require_understood``.
    """
    _require_positions(args)
    rope = args.position_embedding_type == "rope"
    config: Config = {
        "model_type": MODEL_TYPE,
        "vocab_size": vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": _num_layers(args),
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": num_query_groups(args),
        "head_dim": args.kv_channels,
        "hidden_act": _activation(args),
        "max_position_embeddings": args.max_position_embeddings,
        "normalization": args.normalization,
        "norm_eps": float(args.layernorm_epsilon),
        "norm_zero_centered": bool(args.layernorm_zero_centered_gamma),
        "position_embedding_type": args.position_embedding_type,
        "rope_theta": float(args.rotary_base),
        "rotary_percent": float(args.rotary_percent),
        "rotary_interleaved": bool(rope and args.rotary_interleaved),
        "rope_scaling": _rope_scaling(args) if rope else None,
        "attention_bias": bool(args.add_bias_linear or args.add_qkv_bias),
        "attention_output_bias": bool(args.add_bias_linear),
        "mlp_bias": bool(args.add_bias_linear),
        "gated_mlp": bool(args.swiglu),
        "qk_layernorm": bool(args.qk_layernorm),
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
    }
    sla = sla_config_from_args(args)
    return config | (DENSE if sla is None or sla.is_dense else sla_fields(sla))


def written(config: Mapping[str, Any]) -> Config:
    """``config`` as ``config.json`` has it, for all who read one.

    The paper's method is written as it was before there were others: without what is shared, and from which layers.
    transformers warns of an empty ``rope_scaling``.
    """
    is_papers = all(config.get(name, DENSE[name]) == DENSE[name] for name in _OF_VARIANTS)
    left_out = [*(_OF_VARIANTS if is_papers else ()), *(["rope_scaling"] if config.get("rope_scaling") is None else [])]
    return {name: value for name, value in config.items() if name not in left_out}


def rope_parameters(config: Mapping[str, Any]) -> Config:
    """``config``'s fields of rotary embedding by transformers 5's name, to be written beside them.

    Empty without rotary positions: tools that find one take a model for one that has them.
    """
    if config["position_embedding_type"] != "rope":
        return {}
    always = {"rope_theta": config["rope_theta"], "partial_rotary_factor": config["rotary_percent"]}
    return {"rope_parameters": {"rope_type": "default", **always, **(config.get("rope_scaling") or {})}}


#: The fields of a dense model.
DENSE: Config = {
    **{"sla_skip_distances": [], "sla_source_layers": [], "sla_skip_groups": [], "sla_layers": []},
    **{"sla_share": "kv", "sla_kv_projection": "full"},
}


# Fields that exports of before do not have; the paper's method has the values of a dense model.
_OF_VARIANTS = ("sla_source_layers", "sla_share")


def sla_fields(sla: SLAConfig) -> Config:
    """The ``sla_*`` fields, as they are also where no head skips."""
    return {
        "sla_skip_distances": list(sla.skip_distances),
        "sla_source_layers": list(sla.source_layers),
        "sla_skip_groups": list(sla.skip_groups),
        "sla_layers": list(sla.consumer_layers),
        "sla_share": sla.share,
        "sla_kv_projection": sla.kv_projection,
    }


def _num_layers(args: Namespace) -> int:
    """Pairs of attention and MLP: of a hybrid model that computes what a GPT does, half of its layers."""
    pattern = hybrid_pattern(args)
    if pattern is None:
        return args.num_layers
    shown = f"--hybrid-layer-pattern {pattern}"
    for kind, what in _OTHER_KINDS.items():
        if kind in pattern:
            raise ConvertError(f"{shown}: the Hugging Face format has no {what} ({kind})")
    main = kinds(pattern)
    if not main or main != "*-" * (len(main) // 2):
        raise ConvertError(f"{shown}: layers do not pair up: expected an MLP (-) after each attention (*), as *-*-")
    for name in _NOT_IN_HYBRIDS:
        if getattr(args, name):
            raise ConvertError(f"{flag_of(name)}: Megatron's hybrid models do not compute with it what its GPTs do")
    return len(main) // 2


def _require_positions(args: Namespace) -> None:
    kind = args.position_embedding_type
    if kind not in ("learned_absolute", "rope"):
        raise ConvertError(f"--position-embedding-type {kind}: the Hugging Face format has learned_absolute and rope")
    if kind == "learned_absolute" and not args.add_position_embedding:
        raise ConvertError("--no-position-embedding: the Hugging Face format has no model without positions")


def _activation(args: Namespace) -> str:
    if args.swiglu:
        return "silu"
    if args.squared_relu:
        return "relu2"
    # Megatron's fused kernel is the tanh approximation; without fusion it is exact.
    if args.bias_gelu_fusion and args.add_bias_linear:
        return "gelu_pytorch_tanh"
    for name in ("use_te_activation_func", "use_transformer_engine_op_fuser"):
        if getattr(args, name):
            raise ConvertError(
                f"{flag_of(name)}: Transformer Engine's GELU is the tanh approximation, Megatron's own is exact "
                f"here; --override {name}=False says that the model was trained with the latter"
            )
    return "gelu"


def _rope_scaling(args: Namespace) -> Config | None:
    linear = args.rotary_seq_len_interpolation_factor
    if args.use_rope_scaling:
        if linear not in (None, 1):
            raise ConvertError(f"--rotary-seq-len-interpolation-factor {linear}: not together with --use-rope-scaling")
        return _LLAMA3 | {"factor": _rope_factor(args)}
    return None if linear in (None, 1) else {"rope_type": "linear", "factor": float(linear)}


def _rope_factor(args: Namespace) -> float:
    """The factor that the model was built with, which the flag alone does not tell."""
    factor = float(args.rope_scaling_factor)
    if factor != _LLAMA3["factor"] and not args.rope_scaling_factor_honoured:
        raise ConvertError(
            f"--rope-scaling-factor {factor:g}: Megatron itself ignores it, its models have {_LLAMA3['factor']:g}: "
            f"--override rope_scaling_factor={_LLAMA3['factor']} says that this one has, --override "
            "rope_scaling_factor_honoured=True that it was trained with the flag's"
        )
    return factor


def argv_from_config(config: Mapping[str, Any]) -> list[str]:
    """Megatron's flags for a model of ``config``; the reverse of :func:`config_from_args`.

    Raises:
        ConvertError: for a value that Megatron has no flag for.
    """
    flags: dict[str, Any] = {
        "num-layers": config["num_hidden_layers"],
        "hidden-size": config["hidden_size"],
        "ffn-hidden-size": config["intermediate_size"],
        "num-attention-heads": config["num_attention_heads"],
        "kv-channels": config["head_dim"],
        "seq-length": config["max_position_embeddings"],
        "max-position-embeddings": config["max_position_embeddings"],
        "normalization": config["normalization"],
        "norm-epsilon": config["norm_eps"],
        "apply-layernorm-1p": config["norm_zero_centered"],
        "position-embedding-type": config["position_embedding_type"],
        "untie-embeddings-and-output-weights": not config["tie_word_embeddings"],
        "qk-layernorm": config["qk_layernorm"],
    }
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        flags |= {"group-query-attention": True, "num-query-groups": config["num_key_value_heads"]}
    return _as_argv(flags | _rope_flags(config) | _bias_flags(config) | _activation_flags(config) | _sla_flags(config))


def _as_argv(flags: Mapping[str, Any]) -> list[str]:
    argv: list[str] = []
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            argv += [f"--{name}", str(value)]
    return argv


def _rope_flags(config: Mapping[str, Any]) -> Config:
    if config["position_embedding_type"] != "rope":
        return {}
    flags: Config = {
        "rotary-base": _whole(config["rope_theta"], "rope_theta"),
        "rotary-percent": config["rotary_percent"],
        "rotary-interleaved": config["rotary_interleaved"],
    }
    scaling = config.get("rope_scaling")
    if scaling is None:
        return flags
    if scaling["rope_type"] == "linear":
        return flags | {"rotary-seq-len-interpolation-factor": _whole(scaling["factor"], "rope_scaling.factor")}
    if dict(scaling) | {"factor": 0} != _LLAMA3 | {"factor": 0}:
        raise ConvertError(f"rope_scaling {dict(scaling)}: Megatron has linear scaling, and {_LLAMA3} with any factor")
    return flags | {"use-rope-scaling": True, "rope-scaling-factor": float(scaling["factor"])}


def _whole(value: float, name: str) -> int:
    if value != int(value):
        raise ConvertError(f"{name} {value}: Megatron takes whole numbers")
    return int(value)


def _bias_flags(config: Mapping[str, Any]) -> Config:
    attention, output, mlp = (config[name] for name in ("attention_bias", "attention_output_bias", "mlp_bias"))
    if output != mlp or (mlp and not attention):
        raise ConvertError(
            f"attention_bias {attention}, attention_output_bias {output}, mlp_bias {mlp}: Megatron has biases in all "
            "linear layers, in those of queries, keys and values alone, or in none"
        )
    return {"disable-bias-linear": not mlp, "add-qkv-bias": attention and not mlp}


def _activation_flags(config: Mapping[str, Any]) -> Config:
    act, gated = config["hidden_act"], config["gated_mlp"]
    if gated and act == "silu":
        return {"swiglu": True}
    if not gated and act == "relu2":
        return {"squared-relu": True, "no-bias-gelu-fusion": True}
    if not gated and act == "gelu":
        return {"no-bias-gelu-fusion": True}
    if not gated and act in ("gelu_pytorch_tanh", "gelu_new") and config["mlp_bias"]:
        return {}
    raise ConvertError(
        f"hidden_act {act} with gated_mlp {gated} and mlp_bias {config['mlp_bias']}: Megatron has gated silu, and "
        "plain gelu, gelu_pytorch_tanh (with biases) and relu2"
    )


def _sla_flags(config: Mapping[str, Any]) -> Config:
    if not config["sla_skip_distances"] and not config["sla_source_layers"]:
        return {}
    return {
        "sla": True,
        "sla-skip-distance": config["sla_skip_distances"] or None,
        "sla-source-layer": config["sla_source_layers"] or None,
        "sla-num-skip-groups": len(config["sla_skip_groups"]),
        "sla-share": config["sla_share"],
        # Where none is beyond the distance or the source, that is the default.
        "sla-layers": compact_ranges(config["sla_layers"]) or None,
        "sla-kv-projection": config["sla_kv_projection"],
    }
