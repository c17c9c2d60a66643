"""Checkpoints of small GPTs, each with one argument that is not usual, and what becomes of its export.

What is expected comes from Megatron's source: what its model does with the argument.  ``flags`` are those that the
model is built with, by Megatron; ``stored`` is what the checkpoint says of a model that a CPU cannot build, or that
another machine, version or layout built to the same function.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.support.convert_models import MISSING

#: With rotary positions, RMSNorm and grouped queries, as most models have today.
ROPE = {"position_embedding_type": "rope", "normalization": "RMSNorm", "group_query_attention": True}
ROPE |= {"num_query_groups": 2, "rotary_base": 500}
SWIGLU = ROPE | {"swiglu": True, "disable_bias_linear": True}
LLAMA3 = ROPE | {"use_rope_scaling": True, "rotary_base": 500000}
EXACT_GELU = {"no_bias_gelu_fusion": True}


@dataclass(frozen=True)
class Row:
    """One checkpoint.

    Attributes:
        refused: the line, as a pattern; ``None``: exported, and equal.
        taken: what an exporter that refuses nothing takes arguments for.
        caught: what ``--verify``, or the weights, then say.
    """

    flags: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    taken: dict[str, Any] = field(default_factory=dict)
    caught: str = "logits NOT equal"


def _no_field(flag: str, value: str) -> str:
    return rf"--{flag} {value}: the Hugging Face format has no field for it, which changes "


def _unknown(flag: str, value: str) -> str:
    return rf"--{flag} {value}: no argument that this version knows.*--override {flag.replace('-', '_')}=None"


#: What the format has a field for.
MAPPED = {
    "norm-epsilon": Row({"norm_epsilon": 1e-2}),
    "layernorm-1p": Row({"apply_layernorm_1p": True}),
    "rms-1p": Row(ROPE | {"apply_layernorm_1p": True}),
    "qk-layernorm": Row(ROPE | {"qk_layernorm": True, "norm_epsilon": 1e-2}),
    "rotary-percent": Row(ROPE | {"rotary_percent": 0.5}),
    "rotary-interleaved": Row(ROPE | {"rotary_interleaved": True}),
    "rotary-interpolation": Row(ROPE | {"rotary_seq_len_interpolation_factor": 4}),
    "use-rope-scaling": Row(LLAMA3),
    "rope-scaling-factor-honoured": Row(
        LLAMA3 | {"rope_scaling_factor": 32.0},
        {"rope_scaling_factor_honoured": True},
    ),
    "use-rotary-position-embeddings": Row({"use_rotary_position_embeddings": True}),
    "exact-gelu": Row(EXACT_GELU),
    "squared-relu": Row(EXACT_GELU | {"squared_relu": True}),
    "swiglu": Row(SWIGLU),
    "qkv-bias": Row(ROPE | {"disable_bias_linear": True, "add_qkv_bias": True}),
    "kv-channels": Row({"kv_channels": 12}),
    "untied": Row({"untie_embeddings_and_output_weights": True}),
    "longer-than-trained": Row({"seq_length": 8}),
    "positions-beyond-the-longest-text": Row({"max_position_embeddings": 1100}),
    "sla": Row(SWIGLU | {"sla": True, "sla_skip_distance": [1], "sla_kv_projection": "pruned"}),
    "sla-share": Row(SWIGLU | {"sla": True, "sla_share": "keys", "sla_kv_projection": "pruned"}),
    "sla-source-layer": Row(SWIGLU | {"sla": True, "sla_source_layer": [2, 1], "sla_num_skip_groups": 1.0}),
    # Of a version that had neither.
    "sla-of-before": Row(SWIGLU | {"sla": True}, {"sla_share": MISSING, "sla_source_layer": MISSING}),
}

#: What changes no function.
HARMLESS = {
    "dropout": Row({"hidden_dropout": 0.3, "attention_dropout": 0.2}),
    "bf16": Row(SWIGLU | {"bf16": True}),
    "fp8": Row({}, {"fp8": "hybrid", "fp8_recipe": "delayed", "first_last_layers_bf16": True}),
    "fp32-residual": Row({}, {"fp32_residual_connection": True, "bf16": True}),
    "query-key-layer-scaling": Row({"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}),
    "tensor-parallel": Row(
        {}, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "world_size": 8, "tp_comm_overlap": True}
    ),
    "pipeline": Row(
        {},
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "decoder_first_pipeline_num_layers": 1,
            "account_for_loss_in_pipeline_split": True,
            "overlap_p2p_comm": True,
        },
    ),
    "context-parallel": Row(
        SWIGLU, {"context_parallel_size": 2, "cp_comm_type": ["a2a"], "dataloader_inter_document_masking": True}
    ),
    "sharded-and-restarted": Row(
        {}, {"use_torch_fsdp2": True, "expert_model_parallel_size": 2, "inprocess_restart": True, "async_save": True}
    ),
    "transformer-engine": Row(
        SWIGLU,
        {
            "transformer_impl": "transformer_engine",
            "bias_swiglu_fusion": True,
            "masked_softmax_fusion": True,
            "apply_rope_fusion": True,
            "gradient_accumulation_fusion": True,
            "no_persist_layer_norm": False,
            "use_te_activation_func": True,
        },
    ),
    "op-fuser": Row({}, {"use_transformer_engine_op_fuser": True}),
    "core-attention": Row(SWIGLU, {"core_attention": "sdpa", "device": "cuda"}),
    "recompute": Row({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    "cuda-graph": Row({}, {"cuda_graph_impl": "full_iteration", "cuda_graph_warmup_steps": 5}),
    "chunks": Row({"mlp_chunks_for_training": 2}),
    "qk-clip": Row({}, {"qk_clip": True, "qk_clip_alpha": 0.3}),
    "first-weights": Row({"init_method_std": 0.3, "embedding_init_method_std": 1.0}),
    "frozen": Row({}, {"freeze_all_layers": True, "optimizer": "muon", "muon_momentum": 0.5}),
    "data": Row({}, {"reset_attention_mask": True, "reset_position_ids": True, "sft": True, "fim_data": True}),
    "reinforcement": Row({}, {"perform_rl_step": True, "grpo_kl_beta": 0.5}),
    "attention-backend": Row({"attention_backend": "flash"}),
    "a-large-run": Row(
        SWIGLU | {"bf16": True},
        {
            "transformer_impl": "transformer_engine",
            "tensor_model_parallel_size": 4,
            "pipeline_model_parallel_size": 4,
            "context_parallel_size": 2,
            "pipeline_model_parallel_layout": "Et|t|t|tL",
            "hierarchical_context_parallel_sizes": [2, 1],
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "delay_wgrad_compute": True,
            "defer_embedding_wgrad_compute": True,
            "fp8": "e4m3",
            "fp8_recipe": "mxfp8",
            "fp8_param_gather": True,
            "cuda_graph_impl": "transformer_engine",
            "te_rng_tracker": True,
            "cross_entropy_loss_fusion": True,
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn", "layernorm"],
            "fine_grained_activation_offloading": True,
            "offload_modules": ["core_attn"],
            "cpu_offloading": True,
            "cpu_offloading_num_layers": 1,
            "inference_fuse_tp_communication": True,
            "batch_invariant_mode": True,
            "deterministic_mode": True,
            "log_max_attention_logit": True,
        },
    ),
    # Read only beside another, which is off.
    "experts-without-experts": Row({"moe_router_topk": 4, "moe_aux_loss_coeff": 0.01}, {"num_experts": 0}),
    "mup-without-mup": Row({"mup_base_hidden_size": 16, "mup_output_mult": 3.0, "mup_embedding_mult": 2.0}),
    "window-frequency-without-window": Row({"window_attn_skip_freq": 2}),
    "yarn-without-yarn": Row(ROPE | {"rotary_scaling_factor": 40.0, "mscale": 0.7, "yarn_beta_fast": 2.0}),
    "latent-without-latent": Row({"kv_lora_rank": 8, "q_lora_rank": 8}),
    "openai-gelu": Row({"openai_gelu": True}),
    "rope-type": Row(ROPE | {"rope_type": "rope"}),
    # Of other versions.
    "unknown-and-off": Row({}, {"next_years_gate": False, "next_years_list": [], "next_years_number": 0}),
    "older-names": Row(
        {"norm_epsilon": 1e-2, "apply_layernorm_1p": True},
        {
            "norm_epsilon": 1e-2,
            "apply_layernorm_1p": True,
            "layernorm_epsilon": MISSING,
            "layernorm_zero_centered_gamma": MISSING,
            "use_mcore_models": True,
            "retro_num_neighbors": 2,
            "rotary_base": MISSING,
            "softmax_type": MISSING,
            "use_mup": MISSING,
            "add_qkv_bias": MISSING,
            "rope_scaling_factor_honoured": MISSING,
        },
    ),
    "older-rotary": Row(ROPE, {"use_rotary_position_embeddings": True, "position_embedding_type": MISSING}),
}

#: What would make another model of it: built as such, by Megatron.
REFUSED = {
    "mup": Row({"use_mup": True}, refused=_no_field("use-mup", "True")),
    "mup-wide": Row(ROPE | {"use_mup": True, "mup_base_hidden_size": 8}, refused=_no_field("use-mup", "True")),
    "mup-and-window": Row(
        {"use_mup": True, "window_size": "4,0"}, refused=r"--use-mup True, --window-size \(4, 0\): .* for them"
    ),
    "softmax-scale": Row({}, {"softmax_scale": 0.5}, _no_field("softmax-scale", "0.5")),
    "window": Row({"window_size": "4,0"}, refused=_no_field("window-size", r"\(4, 0\)")),
    "softmax-off-by-one": Row({"softmax_type": "off-by-one"}, refused=_no_field("softmax-type", "off-by-one")),
    "softmax-learnable": Row(
        {"softmax_type": "learnable"},
        refused=_no_field("softmax-type", "learnable"),
        caught="core_attention.softmax_offset is not part of this architecture",
    ),
    "no-rope-frequency": Row(ROPE | {"no_rope_freq": 2}, refused=_no_field("no-rope-freq", "2")),
    "quick-geglu": Row(
        EXACT_GELU | {"quick_geglu": True},
        refused=_no_field("quick-geglu", "True"),
        caught="linear_fc1.weight has 256 rows",
    ),
    "activation-clamp": Row(
        SWIGLU | {"activation_func_clamp_value": 0.1, "no_bias_swiglu_fusion": True},
        refused=_no_field("activation-func-clamp-value", "0.1"),
    ),
    "glu-offset": Row(
        SWIGLU | {"glu_linear_offset": 1.0, "no_bias_swiglu_fusion": True},
        refused=_no_field("glu-linear-offset", "1.0"),
    ),
    "no-positions": Row(
        {"position_embedding_type": "none"},
        refused="--position-embedding-type none: .* learned_absolute and rope",
        taken={"position_embedding_type": "rope"},
    ),
    "yarn": Row(
        ROPE | {"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0},
        refused="--position-embedding-type yarn: .* learned_absolute and rope",
        taken={"position_embedding_type": "rope"},
    ),
    # Megatron's model has 8.
    "rope-scaling-factor": Row(
        LLAMA3 | {"rope_scaling_factor": 32.0},
        refused="--rope-scaling-factor 32: Megatron itself ignores it, its models have 8: --override",
        taken={"rope_scaling_factor_honoured": True},
    ),
    "rope-scaling-and-interpolation": Row(
        LLAMA3 | {"rotary_seq_len_interpolation_factor": 4},
        refused="--rotary-seq-len-interpolation-factor 4: not together with --use-rope-scaling",
        taken={"use_rope_scaling": False},
    ),
}

#: The same, of models that are not built for the test: the weights are a plain model's.
REFUSED_AS_STORED = {
    "qk-l2-norm": Row({}, {"qk_l2_norm": True}, _no_field("qk-l2-norm", "True")),
    "output-gate": Row({}, {"attention_output_gate": True}, _no_field("attention-output-gate", "True")),
    "rope-type-yarn": Row(ROPE, {"rope_type": "yarn"}, _no_field("rope-type", "yarn")),
    "post-layernorm-residual": Row(
        {},
        {"apply_residual_connection_post_layernorm": True},
        _no_field("apply-residual-connection-post-layernorm", "True"),
    ),
    "te-gelu": Row(EXACT_GELU, {"use_te_activation_func": True}, "--use-te-activation-func: .* tanh approximation"),
    "op-fuser-gelu": Row(EXACT_GELU, {"use_transformer_engine_op_fuser": True}, "--use-transformer-engine-op-fuser: "),
    "mrope": Row(ROPE, {"position_embedding_type": "mrope"}, "--position-embedding-type mrope: "),
    "relative": Row({}, {"position_embedding_type": "relative"}, "--position-embedding-type relative: "),
    "no-position-embedding": Row({}, {"add_position_embedding": False}, "--no-position-embedding: "),
    "experts": Row({}, {"num_experts": 4}, _no_field("num-experts", "4")),
    "multi-token": Row({}, {"mtp_num_layers": 1}, _no_field("mtp-num-layers", "1")),
    "latent": Row({}, {"multi_latent_attention": True}, _no_field("multi-latent-attention", "True")),
    "experimental": Row(
        {},
        {"experimental_attention_variant": "gated_delta_net"},
        _no_field("experimental-attention-variant", "gated_delta_net"),
    ),
    "linear": Row({}, {"linear_attention_freq": 4}, _no_field("linear-attention-freq", "4")),
    "heterogeneous": Row(
        {}, {"heterogeneous_layers_config_encoded_json": "{}"}, "--heterogeneous-layers-config-encoded-json"
    ),
    "hybrid": Row({}, {"hybrid_layer_pattern": "M*M*"}, r"--hybrid-layer-pattern M\*M\*: .* no Mamba layers"),
    "dense-grouped-gemm": Row({}, {"use_grouped_gemm_for_dense_mlp": True}, "--use-grouped-gemm-for-dense-mlp True"),
    "spec": Row({}, {"spec": ["some.module", "spec"]}, _no_field("spec", r"\['some.module', 'spec'\]")),
    "yaml": Row({}, {"yaml_cfg": "model.yaml"}, _no_field("yaml-cfg", "model.yaml")),
    "retro": Row({}, {"retro_add_retriever": True}, _no_field("retro-add-retriever", "True")),
    "unknown": Row({}, {"logit_softcap": 30.0}, _unknown("logit-softcap", "30.0")),
    "unknown-tensor": Row({}, {"residual_scale": [0.5, 0.25]}, _unknown("residual-scale", r"\[0.5, 0.25\]")),
    "later-version": Row({}, {"enable_mhc_connections": True}, _no_field("enable-mhc-connections", "True")),
    "both-names": Row({}, {"norm_epsilon": 1e-2}, _unknown("norm-epsilon", "0.01")),
}
