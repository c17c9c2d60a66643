"""transformers' own models of the shapes that are measured: what the Hugging Face model is compared with."""

from __future__ import annotations

from typing import Any

from .models import hf_config


def peer_model(name: str, positions: int = 0) -> Any:
    """``LlamaForCausalLM`` or ``GPT2LMHeadModel`` of the shape ``name``, with random weights.

    GPT-2 has the activation of its releases, ``gelu_new``: the same function as ``gelu_pytorch_tanh``, written out in
    eight operations.

    Args:
        name: one of :data:`benchmarks.models.SHAPES`.
        positions: as for :func:`benchmarks.models.hf_config`.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    config = hf_config(name, "dense", positions)
    if config.position_embedding_type == "learned_absolute":
        return GPT2LMHeadModel(
            GPT2Config(
                **{"vocab_size": config.vocab_size, "n_embd": config.hidden_size, "n_layer": config.num_hidden_layers},
                **{"n_head": config.num_attention_heads, "n_positions": config.max_position_embeddings},
                **{"n_inner": config.intermediate_size, "bos_token_id": None, "eos_token_id": None},
            )
        )
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "tie_word_embeddings"),
    )
    fields = {field: getattr(config, field) for field in same}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**fields, **ends, rms_norm_eps=config.norm_eps, rope_parameters=rope))
