"""Megatron's arguments that do not change what a trained GPT computes: each name under the reason why.  Pure Python.

Names are those of the parsed arguments: all that 0.19 and its development line have, and those that earlier versions
stored.  What is in no table is refused once it is set (``stored_arguments.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

#: Reason -> names.  Any value is fine.
HARMLESS: Mapping[str, str] = {
    "how the work is shared out, and over which wires: a sum in another order": """
        tensor_model_parallel_size tensor_parallel_num_weight_shards pipeline_model_parallel_comm_backend
        pipeline_model_parallel_size sequence_parallel context_parallel_size hierarchical_context_parallel_sizes
        max_seqlen_per_dp_cp_rank hybrid_context_parallel expert_model_parallel_size expert_tensor_parallel_size
        expert_tensor_parallel_num_weight_shards tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad
        tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs
        tp_comm_bootstrap_backend overlap_moe_expert_parallel_comm delay_wgrad_compute
        overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release use_ring_exchange_p2p
        defer_embedding_wgrad_compute wgrad_deferral_limit overlap_p2p_comm_warmup_flush
        microbatch_group_size_per_vp_stage account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
        high_priority_a2a_comm_stream symmetric_ar_type nccl_all_reduce_for_prefill tp_comm_overlap_cfg
        overlap_cpu_optimizer_d2h_h2d strict_fsdp_dtensor_load distributed_backend distributed_timeout_minutes
        align_grad_reduce local_rank lazy_mpu_init use_megatron_fsdp use_torch_fsdp2 nccl_communicator_config_path
        use_tp_pp_dp_mapping use_gloo_process_groups use_sharp sharp_enabled_group high_priority_stream_groups
        distributed_timeout_seconds_after_init flight_recorder_dump_path flight_recorder_trace_buffer_size
        flight_recorder_dump_on_timeout flight_recorder_include_stack_trace flight_recorder_include_only_active
        flight_recorder_extra_dump_on_exec decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
        pipeline_model_parallel_layout model_parallel_size num_layers_per_virtual_pipeline_stage
        num_virtual_stages_per_pipeline_rank overlap_p2p_comm overlap_grad_reduce ddp_num_buckets ddp_bucket_size
        ddp_pad_buckets_for_high_nccl_busbw ddp_reduce_scatter_with_fp32_accumulation
        ddp_param_name_patterns_for_fp32_local_accumulation ddp_average_in_collective overlap_param_gather
        overlap_param_gather_with_optimizer_step align_param_gather use_distributed_optimizer
        use_layer_wise_param_layout nccl_ub disable_symmetric_registration fsdp_manual_registration
        create_all_gather_group data_parallel_sharding_strategy outer_dp_sharding_strategy gradient_reduce_div_fusion
        fsdp_double_buffer suggested_communication_unit_size enable_full_sharding_in_hsdp
        num_distributed_optimizer_instances torch_fsdp2_reshard_after_forward cp_comm_type fake_process_group
        megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype
        megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_max_pool_double_buffer
        fsdp_db_use_persist_buf_on_alloc_fail gtp_remat_opt_in_modules gtp_remat_reduce_scatter_with_fp32_accumulation
        megatron_fsdp_version gtp_remat_nccl_ub gtp_expert_remat_nccl_ub async_tensor_model_parallel_allreduce
        pipeline_model_parallel_split_rank delay_grad_reduce delay_param_gather scatter_gather_tensors_in_pipeline
        standalone_embedding_stage encoder_tensor_model_parallel_size encoder_pipeline_model_parallel_size
        enable_gloo_process_groups use_custom_fsdp
        cp_partition_mode dynamic_context_parallel min_dynamic_context_parallel_size
        megatron_fsdp_cache_param_bucket_views megatron_fsdp_prefetch_recompute_forward_weights
    """,
    "rounding: exported in the stored type, compared in fp32": """
        fp16 bf16 fp32_residual_connection disable_bf16_reduced_precision_matmul fp8 fp8_recipe fp8_quantizer_factory
        fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_output_proj
        first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4 fp4_recipe
        fp4_quantizer_factory stream_ckpt_dequant grad_reduce_in_bf16 loss_scale initial_loss_scale min_loss_scale
        loss_scale_window hysteresis attention_softmax_in_fp32 accumulate_allreduce_grads_in_fp32 fp16_lm_cross_entropy
        reuse_grad_buf_for_mxfp8_param_ag keep_fp8_transpose_cache fp4_param_gather fp8_param_gather
        te_precision_config_file logit_dtype keep_fp8_transpose_cache_when_using_custom_fsdp fp4_param
        kitchen_config_file kitchen_recipe_number
    """,
    "scores are divided by the layer's number and multiplied by it again, before the softmax": """
        apply_query_key_layer_scaling
    """,
    "other kernels, or graphs of them, for the same function": """
        deterministic_mode cross_entropy_loss_fusion cross_entropy_fusion_impl attention_backend flash_attention_version
        use_fused_weighted_squared_relu fused_residual_rmsnorm use_kitchen_attention kitchen_attention_backend
        enable_cuda_graph cuda_graph_warmup_steps external_cuda_graph cuda_graph_impl clone_scatter_output_in_embedding
        batch_invariant_mode mlp_chunks_for_prefill mlp_chunks_for_training transformer_impl masked_softmax_fusion
        bias_swiglu_fusion bias_dropout_fusion apply_rope_fusion use_flash_attn no_persist_layer_norm
        gradient_accumulation_fusion disable_jit_fuser test_mode cuda_graph_scope_deprecated cuda_graph_modules
        enable_experimental batch_invariant_backend use_mcore_models cuda_graph_scope
        cuda_graph_dynamic_microbatches fallback_to_eager_attn
    """,
    "memory: what is kept, computed again or moved away for the backward pass": """
        cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers recompute_granularity recompute_method
        recompute_num_layers distribute_saved_activations recompute_modules fine_grained_activation_offloading
        offload_modules min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
        activation_offload_fraction fine_grained_offloading_max_inflight_offloads empty_unused_memory_level
        recompute_activations checkpoint_activations
        offload_optimizer_states chunked_optimizer_state_offload optimizer_state_offload_fraction
        optimizer_state_offload_chunk_size_mb disable_grad_buffers_cpu_backup disable_param_buffers_cpu_backup
    """,
    "the first weights and random numbers; the trained ones are stored": """
        perform_initialization use_cpu_initialization init_method_std embedding_init_method_std
        init_model_with_meta_device seed te_rng_tracker inference_rng_tracker data_parallel_random_init
        init_method_xavier_uniform
    """,
    "how the weights came to be what they are: dropout, loss, optimizer, learning rate": """
        hidden_dropout attention_dropout calculate_per_token_loss weight_decay apply_wd_to_qk_layernorm clip_grad
        adam_beta1 adam_beta2 adam_eps sgd_momentum muon_momentum muon_split_qkv muon_nesterov muon_scale_mode
        muon_fp32_matmul_prec muon_coefficient_type muon_num_ns_steps muon_tp_mode muon_extra_scale_factor
        muon_scalar_optimizer lion_beta1 lion_beta2 no_weight_decay_cond_type optimizer optimizer_cpu_offload
        optimizer_cuda_graph optimizer_offload_fraction use_torch_optimizer_for_cpu_offload
        dump_param_to_param_group_map pin_cpu_grads pin_cpu_params lr_decay_style lr_wsd_decay_style lr_decay_iters
        lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples lr_warmup_fraction lr_warmup_iters lr_warmup_samples
        lr_warmup_init override_opt_param_scheduler use_checkpoint_opt_param_scheduler start_weight_decay
        end_weight_decay weight_decay_incr_style lr warmup min_lr decoupled_lr decoupled_min_lr freeze_all_layers
        use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype muon_use_syrk
        muon_use_nesterov
    """,
    "scales the weights themselves after a step; they are stored scaled": """
        qk_clip qk_clip_alpha qk_clip_threshold
    """,
    "how long, in what steps and under what watch it was trained": """
        micro_batch_size global_batch_size rampup_batch_size step_batch_size_schedule decrease_batch_size_if_needed
        check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval train_sync_interval train_iters
        train_samples exit_interval exit_duration_in_mins exit_signal_handler exit_signal
        exit_signal_handler_for_dataloader exit_signal_handler_for_training manual_gc manual_gc_interval manual_gc_eval
        iterations_to_skip batch_size check_for_nan_in_loss_and_grad check_for_large_grads
        result_rejected_tracker_filename exit_on_missing_checkpoint eval_iters eval_interval start_eval_at_iter
        eval_global_batch_size eval_micro_batch_size skip_train full_validation multiple_validation_sets
        validation_set_names phase_transition_iterations adlr_autoresume adlr_autoresume_interval inprocess_restart
        inprocess_max_iterations inprocess_monitor_thread_interval inprocess_monitor_process_interval
        inprocess_progress_watchdog_interval inprocess_heartbeat_interval inprocess_soft_timeout inprocess_hard_timeout
        inprocess_heartbeat_timeout inprocess_barrier_timeout inprocess_completion_timeout inprocess_last_call_wait
        inprocess_termination_grace_time inprocess_granularity inprocess_active_world_size inprocess_empty_cuda_cache
        enable_ft_package calc_ft_timeouts ft_num_warmup_iters error_injection_rate error_injection_type rerun_mode
        check_for_spiky_loss fault_injector_ranks fault_injector_num_ranks fault_injector_fault_types
        fault_injector_fault_probabilities fault_injector_fault_delay fault_injector_delay_start_iteration
        fault_injector_mtti_seconds fault_injector_offset_seconds fault_injector_seed
    """,
    "reinforcement learning and distillation: losses and rollouts": """
        perform_rl_step rl_prompts_per_eval grpo_prompts_per_step grpo_group_size rl_generation_lag
        rl_submission_granularity rl_consumption_granularity grpo_iterations grpo_clamp_eps_lower grpo_clamp_eps_upper
        grpo_kl_beta grpo_entropy_term_weight grpo_filter_groups_with_same_reward langrl_env_config
        rl_default_temperature rl_default_top_p rl_default_top_k rl_offload_optimizer_during_inference
        rl_kv_cache_management_mode rl_persist_cuda_graphs rl_partial_rollouts rl_inference_logprobs_is_correction
        rl_importance_sampling_truncation_coef rl_use_sequence_packing rl_sequence_packing_max_sequences_per_bin
        rl_sequence_packing_algo rl_training_cuda_graphs rl_inference_tensor_model_parallel_size
        rl_inference_pipeline_model_parallel_size rl_inference_expert_model_parallel_size
        rl_inference_expert_tensor_model_parallel_size rl_inference_model_unified_memory_level
        rl_offload_inference_model_weights_when_idle refit_method rl_verify_model_weights_swap rl_skip_bos_token
        rl_profile rl_profile_dir rl_inference_parsers logits_save_top_k logits_save_top_p logits_save_top_p_min_k
        logits_save_dir logits_save_dtype logits_load_dir logits_load_decode_threads logits_load_prefetch_factor
        logits_load_msc_prefetch_depth logits_load_kd_loss_alpha logits_load_ignore_errors rl_max_inflight_requests
        rl_durable_rollout_bank rl_rollout_bank_dir rl_rollout_bank_max_bytes grpo_default_temperature
        grpo_default_top_p langrl_inference_server_type langrl_inference_server_conversation_template
        langrl_external_server rl_offload_kv_cache_during_training rl_remove_kv_cache_during_training
        rl_reset_cuda_graphs rl_calculate_intra_group_similarity rl_sequence_packing_bin_size
        rl_parallel_generation_tasks rl_num_parallel_generations rl_num_parallel_generation_batches
        rl_generation_batch_size rl_enforce_generation_order
    """,
    "what it was trained on, and which tokens saw which: a text alone sees all before it": """
        dataloader_type data_path split train_data_path valid_data_path test_data_path data_args_path
        per_split_data_args_path per_dataset_sequences_path dataloader_fast_cache_load dataloader_defer_npy_index_mmap
        data_cache_path mmap_bin_files mock_data seq_length encoder_seq_length num_workers reset_position_ids
        reset_attention_mask dataloader_inter_document_masking eod_mask_loss create_attention_mask_in_dataloader
        num_dataset_builder_threads object_storage_cache_path mid_level_dataset_surplus allow_ambiguous_pad_tokens
        fim_data fim_rate fim_spm_rate fim_split_sample fim_fragment_rate fim_no_prefix fim_prefix_token
        fim_middle_token fim_suffix_token fim_pad_token fim_eod_token enable_msc disable_msc_deprecated sft
        sft_tokenizer_prompt_format s3_cache_path renormalize_blend_weights
        sequence_packing_scheduler use_varlen_dataset varlen_mock_dataset_config_json varlen_sbhd_validation
        sft_mock_dataset_config_json pad_packed_seq_alignment thd_max_packed_sequences thd_tail_padding_policy
    """,
    "carried as a tokenizer (tokenizer.py), not as a field of the model": """
        make_vocab_size_divisible_by vocab_size padded_vocab_size pad_vocab_size vocab_file merge_file vocab_extra_ids
        tokenizer_type tokenizer_model metadata_path special_tokens tiktoken_pattern tiktoken_num_special_tokens
        tokenizer_sentencepiece_legacy tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_hf_no_use_fast
        tokenizer_hf_no_include_special_tokens trust_remote_code null_tokenizer_eod_id null_tokenizer_pad_id
        chat_template use_gigatoken tiktoken_special_tokens tokenizer_metadata legacy_tokenizer tokenizer_special_tokens
        tokenizer_hf_use_fast tokenizer_hf_include_special_tokens
    """,
    "how checkpoints are written and found": """
        save save_interval save_params_interval save_activations_interval save_tokens_per_expert_interval
        save_wgrads_interval save_dgrads_interval save_retain_interval load load_main_params_from_ckpt
        non_persistent_save_interval non_persistent_ckpt_type non_persistent_global_ckpt_dir
        non_persistent_local_ckpt_dir non_persistent_local_ckpt_algo finetune pretrained_checkpoint ckpt_step
        use_checkpoint_args use_mp_args_from_checkpoint_args use_tokenizer_model_from_checkpoint_args ckpt_format
        auto_detect_ckpt_format ckpt_convert_format ckpt_convert_save ckpt_convert_update_legacy_dist_opt_format
        ckpt_fully_parallel_save async_save async_strategy use_persistent_ckpt_worker async_ckpt_cpu_priority
        async_ckpt_io_priority async_ckpt_use_cpu_shm ckpt_fully_parallel_load ckpt_fully_parallel_load_exchange_algo
        ckpt_fully_parallel_save_process_group ckpt_fully_parallel_load_process_group ckpt_assume_constant_structure
        ckpt_load_validate_sharding_integrity dist_ckpt_strictness dist_ckpt_save_pre_mcore_014
        dist_ckpt_optim_fully_reshardable distrib_optim_fully_reshardable_mem_efficient replication replication_jump
        replication_factor verify_integrity no_save_optim no_save_rng no_load_optim no_load_rng override_ckpt_iteration
        use_dist_ckpt_deprecated dist_ckpt_format_deprecated dist_ckpt_workers ckpt_fully_parallel_save_deprecated
        ckpt_fully_parallel_load_per_rank_objects ckpt_pg_tensors_cache_path ckpt_pg_tensors_cache_create
        save_tokenizer_assets ckpt_drop_redundant_extra_state dist_ckpt_format use_dist_ckpt
    """,
    "what is printed, measured and recorded": """
        moe_per_layer_logging config_logger_dir profile profile_step_start profile_step_end use_pytorch_profiler
        pytorch_profiler_collect_shapes pytorch_profiler_collect_callstack pytorch_profiler_collect_chakra profile_ranks
        record_memory_history memory_snapshot_path record_shapes nvtx_ranges log_interval log_params_norm log_throughput
        log_progress timing_log_level timing_log_option tensorboard_dir tensorboard_log_interval tensorboard_queue_size
        log_timers_to_tensorboard log_loss_scale_to_tensorboard log_validation_ppl_to_tensorboard
        log_memory_to_tensorboard log_memory_interval log_device_memory_used log_num_zeros_in_grad
        log_max_attention_logit barrier_with_L1_time log_world_size_to_tensorboard wandb_project wandb_exp_name
        wandb_save_dir wandb_entity logging_level log_energy moe_routing_trace_path moe_routing_trace_max_training_iters
        moe_routing_trace_capture_logits moe_routing_trace_capture_hidden_states moe_routing_trace_dump_weights
        log_straggler straggler_ctrlr_port straggler_minmax_count disable_straggler_on_startup
        run_workload_inspector_server enable_one_logger one_logger_project one_logger_run_name one_logger_async
        app_tag_run_name app_tag_run_version otel_enabled otel_service_name otel_span_groups
        log_batch_size_to_tensorboard log_learning_rate_to_tensorboard one_logger_entity
    """,
    "Megatron's own text generation": """
        inference_cuda_graph_scope flash_decode inference_fuse_tp_communication inference_disable_triton_nvls_kernels
        inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
        inference_batch_times_seqlen_threshold max_tokens_to_oom use_legacy_static_engine inference_max_requests
        inference_max_seq_length inference_dynamic_batching inference_dynamic_batching_buffer_size_gb
        inference_dynamic_batching_paused_buffer_size_gb inference_dynamic_batching_mamba_memory_ratio
        inference_dynamic_batching_block_size inference_dynamic_batching_max_requests
        inference_dynamic_batching_max_tokens inference_dynamic_batching_num_cuda_graphs
        inference_dynamic_batching_track_paused_request_events inference_dynamic_batching_track_generated_token_events
        decode_only_cuda_graphs inference_cuda_graph_all_prefills inference_cuda_graph_max_tokens
        inference_dynamic_batching_unified_memory_level enable_chunked_prefill num_speculative_tokens
        inference_dynamic_batching_enable_prefix_caching inference_dynamic_batching_prefix_caching_eviction_policy
        inference_dynamic_batching_prefix_caching_coordinator_policy
        inference_dynamic_batching_prefix_caching_routing_alpha inference_dynamic_batching_prefix_caching_mamba_gb
        inference_dynamic_batching_cuda_graph_mixed_prefill_count
        inference_dynamic_batching_cuda_graph_sizing_distribution inference_dynamic_batching_sampling_backend
        offset_sampling_seed_by_dp_rank inference_dynamic_batching_async_sched_mode
        inference_dynamic_batching_logprobs_mode inference_logging_step_interval inference_text_gen_server_logging
        inference_wandb_logging inference_coordinator_port inference_use_synchronous_zmq_collectives
        inference_disable_ep_consensus inference_shards inference_max_batch_size
        inference_dynamic_batching_buffer_guaranteed_fraction inference_dynamic_batching_buffer_overflow_factor
        inference_dynamic_batching_max_requests_override inference_dynamic_batching_max_tokens_override
        disable_chunked_prefill inference_dynamic_batching_cuda_graph_max_tokens
    """,
    "other models of Megatron: BERT, retrievers, vision; no GPT reads them": """
        bert_binary_head decoder_seq_length sample_rate mask_prob short_seq_prob ict_head_size biencoder_projection_dim
        biencoder_shared_query_context_model ict_load bert_load titles_data_path query_in_block_prob use_one_sent_docs
        evidence_data_path retriever_report_topk_accuracies retriever_score_scaling block_data_path embedding_path
        indexer_batch_size indexer_log_interval num_classes img_h img_w num_channels patch_dim classes_fraction
        data_per_class_fraction data_sharding head_lr_mult vision_pretraining vision_pretraining_type
        vision_backbone_type swin_backbone_type mask_type mask_factor iter_per_epoch dino_local_img_size
        dino_local_crops_number dino_head_hidden_size dino_bottleneck_size dino_freeze_last_layer dino_norm_last_layer
        dino_warmup_teacher_temp dino_teacher_temp dino_warmup_teacher_temp_epochs output_bert_embeddings
        bert_embedder_type
    """,
    "read by nothing that builds a model": """
        openai_gelu onnx_safe deprecated_use_mcore_models
    """,
    "set by Megatron while it validates and trains": """
        rank world_size data_parallel_size transformer_pipeline_model_parallel_size virtual_pipeline_model_parallel_size
        gtp_weight_remat_size expert_gtp_weight_remat_size params_dtype variable_seq_lengths cpu_offloading
        use_layer_wise_distributed_optimizer grpo_samples_per_iteration _is_global_batch_size_explicitly_specified
        consumed_train_samples consumed_train_bins skipped_train_samples consumed_valid_samples iteration curr_iteration
        num_floating_point_operations_so_far do_train do_valid do_test to_test model_type
    """,
    "of sla-megatron: kernels and devices": """
        core_attention device
    """,
    "Megatron's validation sets it to --num-layers": """
        encoder_num_layers
    """,
}
