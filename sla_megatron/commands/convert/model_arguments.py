"""Megatron's arguments that do change what a trained GPT computes: which an export can say, and which it cannot.

With ``harmless_arguments.py`` this is every argument that Megatron has.  Pure Python.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Read by ``architecture.py``, into the fields of ``config.json``; values that these cannot say are refused there.
MAPPED: str = """
    num_layers hybrid_layer_pattern hybrid_override_pattern is_hybrid_model
    hidden_size num_attention_heads num_query_groups group_query_attention ffn_hidden_size kv_channels
    max_position_embeddings position_embedding_type use_rotary_position_embeddings add_position_embedding
    rotary_base rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor
    use_rope_scaling rope_scaling_factor rope_scaling_factor_honoured
    normalization layernorm_epsilon layernorm_zero_centered_gamma qk_layernorm
    add_bias_linear add_qkv_bias swiglu squared_relu untie_embeddings_and_output_weights
    bias_gelu_fusion use_te_activation_func use_transformer_engine_op_fuser
    sla sla_skip_distance sla_source_layer sla_num_skip_groups sla_layers sla_share sla_kv_projection
"""

#: Name -> what it would change.  The format has no field for it; off and Megatron's default are fine.
REFUSED: Mapping[str, str] = {
    "use_mup": "the scale of the scores, the embeddings and the logits",
    "softmax_scale": "the scale of the scores; no flag, but what a script may set",
    "softmax_type": "the denominator of the softmax",
    "qk_l2_norm": "norms of queries and keys",
    "attention_output_gate": "a gate on the attention's output",
    "window_size": "which keys a query sees",
    "no_rope_freq": "which layers have positions",
    "rope_type": "the kind of rotary embedding",
    "apply_residual_connection_post_layernorm": "where the residual comes from; Megatron Core does not read it",
    "quick_geglu": "the activation",
    "activation_func_clamp_value": "the activation",
    "glu_linear_offset": "the activation",
    "num_experts": "experts in place of the MLP",
    "use_grouped_gemm_for_dense_mlp": "how the MLP's weights are stored",
    "multi_latent_attention": "the attention",
    "experimental_attention_variant": "the attention",
    "linear_attention_freq": "the attention",
    "mtp_num_layers": "what is predicted beside the next token; --drop-mtp leaves these layers out",
    "heterogeneous_layers_config_path": "layers that differ",
    "heterogeneous_layers_config_encoded_json": "layers that differ",
    "decoder_num_layers": "an encoder beside the decoder",
    "spec": "layers of the user's own",
    "yaml_cfg": "everything: the arguments do not say what model the file described",
    # Of Megatron's development line after 0.19.
    "enable_mhc_connections": "several residual streams",
    # Of its branch dev.
    "enable_hyper_connections": "several residual streams",
    "head_wise_attn_gate": "a gate behind the attention",
    "rotary_base_per_layer": "each layer's positions",
    "dense_grouped_gemm": "how the MLP's weights are stored",
    # Of earlier versions.
    "hybrid_attention_ratio": "layers of other kinds",
    "hybrid_mlp_ratio": "layers of other kinds",
    "retro_add_retriever": "a retriever",
    "use_legacy_models": "models from before Megatron Core",
}

#: Values of a refused argument that say what is the case anyway.
FINE: Mapping[str, tuple[object, ...]] = {
    "rope_type": ("rope",),
    "softmax_type": ("vanilla",),
    # Megatron's own hybrid layers, which its manual puts on every command line.
    "spec": (["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"],),
}

#: Argument -> names that are read only where it is set, or, for the position embedding, where that is another one than
#: an export can have; then it is refused itself.
ONLY_WITH: Mapping[str, str] = {
    "use_mup": """
        mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power
    """,
    "num_experts": """
        moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_overlap
        use_grouped_gemm_for_shared_expert moe_shared_expert_glu_interleave_size moe_ffn_hidden_size moe_router_topk
        moe_enable_routing_replay moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_router_num_groups
        moe_router_group_topk moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function
        moe_router_dtype moe_router_enable_expert_bias moe_router_bias_update_rate moe_router_quantile_balancing_ema
        moe_router_force_load_balancing moe_router_force_biased moe_grouped_gemm moe_single_grouped_weight
        moe_single_grouped_bias moe_z_loss_coeff moe_input_jitter_eps moe_token_dispatcher_type moe_enable_deepep
        moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs
        moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_pad_experts_for_cuda_graph_inference
        moe_token_drop_policy moe_layer_recompute moe_permute_fusion moe_router_fusion moe_apply_probs_on_input
        moe_latent_size moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
        moe_ncclep_static_shape moe_ncclep_zero_copy moe_mlp_glu_interleave_size moe_expert_rank_capacity_factor
        moe_paged_stash moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        moe_paged_stash_buffer_size_factor_cpu moe_layer_freq moe_use_upcycling moe_router_load_balancing_type
        moe_aux_loss_coeff moe_upcycling_granularity moe_use_grouped_tensor moe_dispatch_fwd_dtype moe_combine_bwd_dtype
        moe_token_dropping moe_extended_tp moe_use_legacy_grouped_gemm moe_router_topk_limited_devices moe_n_hash_layers
        moe_hybridep_pad_variable_tokens moe_ncclep_use_symm_mem log_moe_overload_factor
    """,
    "mtp_num_layers": """
        mtp_standalone mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads mtp_hybrid_override_pattern
        mtp_hsm
    """,
    "multi_latent_attention": """
        q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim cache_mla_latents mla_down_proj_fusion
        original_max_position_embeddings
    """,
    "position_embedding_type": """
        mrope_section mrope_interleaved yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow
        yarn_correction_range_round_to_int relative_attention_num_buckets relative_attention_max_distance
        rotary_scaling_factor mscale mscale_all_dim
    """,
    "experimental_attention_variant": """
        dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_skip_topk_offset
        dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss dsa_kernel_backend dsa_indexer_rope_interleaved
        dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32
        linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
        gdp_num_householder gdp_cutedsl_kernel gdp_num_chunk_states_to_recompute csa_compress_ratios
        csa_compress_rotary_base csa_dense_mode csa_window_size o_groups o_lora_rank linear_attention_type
        linear_cp_mode gdn_conv_pad_alignment gdn_pre_gated_delta_rule_fusion apply_dsa_kernel_fusion
    """,
    "hybrid_layer_pattern": """
        mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path
        mamba_training_ssm_states_dtype mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype
        disable_mamba_mem_eff_path
    """,
    "window_size": """
        window_attn_skip_freq
    """,
    "enable_mhc_connections": """
        mhc_num_residual_streams mhc_sinkhorn_iterations mhc_init_gating_factor mhc_recompute_layer_num
    """,
    "enable_hyper_connections": """
        num_residual_streams use_fused_mhc
    """,
    "retro_add_retriever": """
        retro_workdir retro_cyclic_train_iters retro_encoder_layers retro_encoder_hidden_dropout
        retro_encoder_attention_dropout retro_num_neighbors retro_num_retrieved_chunks retro_return_doc_ids
        retro_verify_neighbor_count retro_project_dir retro_attention_gate retriever_seq_length
        retro_bert_tokenizer_type retro_bert_vocab_file retro_block_size retro_chunk_length retro_neighbor_dirs
        retro_split_preprocessing
    """,
}
