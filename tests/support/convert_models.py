"""Small GPTs over the options of Megatron that the Hugging Face format has, with random weights, as checkpoints."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, HEADS, LENGTH, VOCABULARY = 4, 32, 4, 24, 100

#: Each axis, and the flags of each of its values.
AXES: dict[str, dict[str, dict[str, Any]]] = {
    "norm": {
        "layernorm": {"normalization": "LayerNorm"},
        "rms": {"normalization": "RMSNorm"},
        "layernorm1p": {"normalization": "LayerNorm", "apply_layernorm_1p": True},
        "rms1p": {"normalization": "RMSNorm", "apply_layernorm_1p": True, "norm_epsilon": 1e-3},
    },
    "position": {
        "learned": {"position_embedding_type": "learned_absolute"},
        "rope": {"position_embedding_type": "rope", "rotary_base": 500},
        "half-rope": {"position_embedding_type": "rope", "rotary_percent": 0.5},
        "interleaved": {"position_embedding_type": "rope", "rotary_interleaved": True},
        "linear": {"position_embedding_type": "rope", "rotary_seq_len_interpolation_factor": 4},
        "llama3": {"position_embedding_type": "rope", "use_rope_scaling": True, "rotary_base": 500000},
    },
    "mlp": {
        "gelu-tanh": {},
        "gelu": {"no_bias_gelu_fusion": True},
        "swiglu": {"swiglu": True},
        "relu2": {"squared_relu": True, "no_bias_gelu_fusion": True},
    },
    "bias": {
        "bias": {},
        "no-bias": {"disable_bias_linear": True},
        "qkv-bias": {"disable_bias_linear": True, "add_qkv_bias": True},
    },
    "groups": {"mha": {}, "gqa": {"group_query_attention": True, "num_query_groups": 2}},
    "qk": {"plain": {}, "qk-norm": {"qk_layernorm": True}},
    "head": {"tied": {}, "untied": {"untie_embeddings_and_output_weights": True}},
    "size": {"square": {}, "wide-heads": {"kv_channels": 12, "ffn_hidden_size": 80}},
    "sla": {
        "dense": {},
        "long": {"sla": True, "sla_skip_distance": [3]},
        "short": {"sla": True, "sla_skip_distance": [1], "sla_layers": "2,4"},
        "two": {"sla": True, "sla_skip_distance": [1, 2], "sla_num_skip_groups": 2},
        "all-skip": {"sla": True, "sla_skip_distance": [2], "sla_num_skip_groups": "all"},
        "source": {"sla": True, "sla_source_layer": [1]},
        "sources": {"sla": True, "sla_source_layer": [2, 1], "sla_num_skip_groups": "all", "sla_layers": "2,4"},
    },
    "share": {"kv": {}, "values": {"sla_share": "values"}, "keys": {"sla_share": "keys"}},
    "projection": {"full": {}, "pruned": {"sla_kv_projection": "pruned"}},
}


def _drawn(draw: random.Random) -> dict[str, str]:
    chosen = {axis: draw.choice(list(values)) for axis, values in AXES.items()}
    return chosen | ({"projection": "full", "share": "kv"} if chosen["sla"] == "dense" else {})


def _pairs(chosen: dict[str, str]) -> set[tuple[str, str]]:
    return set(combinations(chosen.values(), 2))


def generated(count: int, seed: int = 1) -> dict[str, dict[str, Any]]:
    """``count`` combinations of one value an axis, the same each time: name -> flags.

    Each is the one, of many drawn at random, with most pairs of values that none before it has.
    """
    draw, found = random.Random(seed), {}
    seen: set[tuple[str, str]] = set()
    while len(found) < count:
        chosen = max((_drawn(draw) for _ in range(200)), key=lambda drawn: len(_pairs(drawn) - seen))
        seen |= _pairs(chosen)
        flags = {name: value for axis, value in chosen.items() for name, value in AXES[axis][value].items()}
        if flags.get("sla_num_skip_groups") == "all":
            flags["sla_num_skip_groups"] = flags.get("num_query_groups", HEADS)
        found["-".join(chosen.values())] = flags
    return found


def argv_of(flags: dict[str, Any]) -> list[str]:
    """Megatron's flags for a model of this file."""
    base = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "seq_length": LENGTH,
        "max_position_embeddings": LENGTH,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": VOCABULARY,
    }
    argv: list[str] = []
    for name, value in (base | flags).items():
        argv.append("--" + name.replace("_", "-"))
        if value is not True:
            argv += [str(each) for each in value] if isinstance(value, list) else [str(value)]
    return argv


#: In place of a stored argument's value: the version that wrote the checkpoint had no such argument.
MISSING = object()


def save_random_checkpoint(
    folder: Path, flags: dict[str, Any], seed: int = 3, stored: Mapping[str, Any] | None = None
) -> Namespace:
    """A checkpoint as Megatron's trainer saves it, of a model in which every parameter is random.

    ``stored``: arguments to be stored otherwise than the model was built with.
    """
    import torch

    from benchmarks.checkpoints import save
    from sla_megatron.commands.convert.megatron_model import args_of, build, megatron_alone

    with megatron_alone():
        args = args_of(argv_of(flags), torch.float32)
        args.padded_vocab_size = 128
        # As training with our flags leaves it (not Megatron's own).
        args.rope_scaling_factor_honoured = bool((stored or {}).get("rope_scaling_factor_honoured"))
        model = build(args)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                values = 0.3 * torch.randn(parameter.shape, generator=generator)
                # Norms at 1, so that activations stay of one size.
                is_gain = "norm" in name and name.endswith("weight") and not args.layernorm_zero_centered_gamma
                parameter.copy_(1 + values if is_gain else values)
        vars(args).update(stored or {})
        for name in [name for name, value in vars(args).items() if value is MISSING]:
            delattr(args, name)
        save(folder, args, model, iteration=7)
    return args
