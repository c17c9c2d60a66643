"""The models that benchmarks measure: shapes by name, dense or with skip-layer attention, by default at its settings.

Weights are random.  What is measured here (time, bytes) does not depend on them.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.common.presets import preset_flags
from sla_megatron.flags.skipping import resolve_settings, sla_config_from_args
from sla_megatron.flags.sla_flags import add_sla_args

_GPT2 = {"vocab_size": 50257, "hidden_act": "gelu_pytorch_tanh"}
_LLAMA = {
    "vocab_size": 32000,
    "hidden_act": "silu",
    "gated_mlp": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}

#: Name -> fields of ``SlaGPTConfig``: models of ``launch/presets``; ``tiny``, for tests; ``narrow`` and
#: ``narrow-llama``, which show on a processor what decoding on a GPU is made of: their time is mostly that of starting
#: operations.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **(_GPT2 | {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}),
        "max_position_embeddings": 64,
    },
    "narrow": _GPT2 | {"vocab_size": 500, "hidden_size": 96, "num_hidden_layers": 12, "num_attention_heads": 12},
    "narrow-llama": {
        **(_LLAMA | {"vocab_size": 500, "hidden_size": 96, "num_hidden_layers": 12, "num_attention_heads": 12}),
        **{"num_key_value_heads": 4, "intermediate_size": 256},
    },
    "gpt2-124m": _GPT2 | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "gpt2-350m": _GPT2 | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "llama-124m": {
        **(_LLAMA | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}),
        **{"num_key_value_heads": 4, "intermediate_size": 2048},
    },
    "1b": {
        **(_LLAMA | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16}),
        **{"num_key_value_heads": 8, "intermediate_size": 7168, "max_position_embeddings": 4096},
    },
}

#: Dense, and skip-layer attention with dead projections kept or left out.
VARIANTS = ("dense", "full", "pruned")


#: Flags of what may be shared: the default settings, values or keys alone at these, and the presets of other methods.
METHODS = {
    "sla": ("--sla",),
    "values": ("--sla", "--sla-share", "values"),
    "keys": ("--sla", "--sla-share", "keys"),
    **{name: preset_flags(name) for name in ("skipv1", "cla2", "half-shared")},
}


def sla_config(name: str, method: str = "sla") -> SLAConfig:
    """Skip-layer attention of the shape ``name`` by one of :data:`METHODS`."""
    shape = SHAPES[name]
    args = Namespace(
        num_layers=shape["num_hidden_layers"],
        num_attention_heads=shape["num_attention_heads"],
        group_query_attention=True,
        num_query_groups=shape.get("num_key_value_heads", shape["num_attention_heads"]),
        hybrid_layer_pattern=None,
    )
    add_sla_args(ArgumentParser()).parse_args(METHODS[method], args)
    resolve_settings(args)
    return sla_config_from_args(args)


def hf_config(name: str, variant: str, positions: int = 0, method: str = "sla") -> Any:
    """The ``SlaGPTConfig`` of the shape ``name``.

    Args:
        name: one of :data:`SHAPES`.
        variant: one of :data:`VARIANTS`.
        positions: how many positions the model must have at least; learned ones are added where it has fewer.
        method: one of :data:`METHODS`, unless it is dense.
    """
    from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig

    fields = dict(SHAPES[name])
    if variant != "dense":
        sla = sla_config(name, method)
        fields |= {"sla_skip_distances": list(sla.skip_distances), "sla_skip_groups": list(sla.skip_groups)}
        fields |= {"sla_layers": None if sla.layers is None else list(sla.layers), "sla_kv_projection": variant}
        fields |= {"sla_share": sla.share, "sla_source_layers": list(sla.source_layers)}
    fields["max_position_embeddings"] = max(fields.get("max_position_embeddings", 1024), positions)
    return SlaGPTConfig(**fields)


def cache_bytes(config: Any, batch: int, positions: int, element_size: int) -> int:
    """By the definition: each key and value of a (layer, group) that some layer reads, once."""
    layers, groups = range(1, config.num_hidden_layers + 1), range(config.num_key_value_heads)
    origins, skipping = config.sla_source_layers or config.sla_skip_distances, config.sla_skip_groups
    origin = {g: origins[j % len(origins)] for j, g in enumerate(skipping)} if origins else {}

    def source(layer: int, group: int) -> int:
        n = origin.get(group, layer)
        if layer <= n or layer not in config.sla_layers:
            return layer
        return n if config.sla_source_layers else layer - n

    live = len({(source(layer, g), g) for layer in layers for g in groups})
    tensors = 2 * live if config.sla_share == "kv" else live + len(layers) * len(groups)
    return tensors * batch * positions * config.head_dim * element_size
