"""Flags that Megatron accepts and that then do nothing, or that end a run in a traceback long after it started.

Each is refused in one line, before anything starts: by this project's entry point, with ``--sla`` or without, and in a
script of one's own with ``--sla``.  The rows say what was seen with Megatron 0.19.2.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace

from ..common.errors import OFF, flag_of
from ..cpu.backend import cpu_backend_is_active
from . import rope_scaling
from .rows import Row
from .sla_flags import MEGATRON, SDPA

_NEEDS_ROPE = "--position-embedding-type rope beside it"
_NEEDS_TE = "--transformer-impl transformer_engine beside it: local layers do not heed it"
_HEEDED_BY_NOTHING = "no such flag: nothing in Megatron heeds it"
# What only Transformer Engine's layers do; without a GPU some of it is refused before, in cpu.flags.
_OF_TE = ("fp8", "fp4", "tp_comm_overlap", "delay_wgrad_compute", "use_transformer_engine_op_fuser")
_OF_TE += ("use_te_activation_func", "te_precision_config_file", "use_grouped_gemm_for_dense_mlp")
_OF_TE += ("cpu_offloading_num_layers", "multi_latent_attention")
_GPTS_ONLY = "no such flag: it is not for GPTs"


def _local(args: Namespace) -> bool:
    return args.transformer_impl == "local"


def _positions(args: Namespace) -> str:
    return "rope" if args.use_rotary_position_embeddings else args.position_embedding_type


def _not_rotary(args: Namespace) -> bool:
    return _positions(args) not in ("rope", "yarn", "mrope") and not args.multi_latent_attention


def _not_yarn(args: Namespace) -> bool:
    return _positions(args) != "yarn" and not args.multi_latent_attention


def _attention_of_te(args: Namespace) -> bool:
    names_local = getattr(args.attention_backend, "name", None) == "local" and not args.num_experts
    return args.transformer_impl == "transformer_engine" and not names_local


def _fused_softmax(args: Namespace) -> bool:
    """Whether the kernel that makes its own mask may stand in for Megatron's local attention."""
    return (args.bf16 or args.fp16) and args.masked_softmax_fusion and not _sdpa(args)


def _fused_gelu(args: Namespace) -> bool:
    fused = args.bias_gelu_fusion and args.add_bias_linear
    return fused and not (args.swiglu or args.quick_geglu or args.squared_relu or args.moe_grouped_gemm)


def _ranks_of_experts(args: Namespace) -> int:
    """Ranks that hold all experts of a pipeline once."""
    tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return args.expert_model_parallel_size * tensor * args.pipeline_model_parallel_size


def _no_layernorm_of_keys(args: Namespace) -> bool:
    return args.sla or not args.qk_layernorm or args.normalization != "LayerNorm"


def _packed(args: Namespace) -> bool:
    """Whether samples hold several documents, or conversations, that attention is told of in place of a mask."""
    return args.dataloader_inter_document_masking or args.sft


def _sdpa(args: Namespace) -> bool:
    return getattr(args, "core_attention", MEGATRON) == SDPA


def _step_is_a_graph(args: Namespace) -> bool:
    return args.cuda_graph_impl == "full_iteration"


def _unknown_spec(args: Namespace) -> bool:
    """Whether ``--spec MODULE NAME`` names nothing; upstream logs that, and builds its default."""
    try:
        module, name = args.spec
        getattr(importlib.import_module(module), name)
    except Exception:
        # Of whatever kind: the module is the user's, and may do anything when it is imported.
        return True
    return False


def _further_tokens_on_the_last_stage(args: Namespace) -> bool:
    """Whether the last of several pipeline stages has the layers of ``--mtp-num-layers``."""
    layout = args.pipeline_model_parallel_layout
    return args.pipeline_model_parallel_size > 1 and (layout is None or "m" in layout.rpartition("|")[2])


def _loads_torchs_adam(args: Namespace) -> bool:
    """Whether a checkpoint's optimizer is to be loaded, and nobody's but torch's is installed."""
    loads = args.load and args.optimizer == "adam" and not (args.no_load_optim or args.finetune)
    others = ("transformer_engine", "apex")
    return loads and (cpu_backend_is_active() or not any(map(importlib.util.find_spec, others)))


def _further_tokens_on_the_first_rank(args: Namespace) -> bool:
    """Whether the first of several pipeline ranks has them, in whichever of its virtual stages."""
    size, layout = args.pipeline_model_parallel_size, args.pipeline_model_parallel_layout
    if size == 1 or layout is None:
        return False
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        stages = PipelineParallelLayerLayout.parse_str_to_list(layout)
    except AssertionError:
        # Megatron will say what it has against it.
        return False
    return any(LayerType.mtp in stage for stage in stages[::size])


_NO_EFFECT = (
    Row("freeze_all_layers", OFF, "no --freeze-all-layers: Megatron trains all layers of a model built in this way"),
    Row("create_all_gather_group", OFF, "no such flag: a model built in this way does not heed it"),
    Row("rampup_batch_size", OFF, "--step-batch-size-schedule in its place: Megatron ignores this one"),
    Row("exit_signal_handler_for_dataloader", OFF, "--exit-signal-handler in its place: nothing heeds this one"),
    Row("mtp_hybrid_override_pattern", OFF, "--mtp-num-layers in its place: Megatron ignores this one in a GPT"),
    Row("decoder_num_layers", OFF, "--num-layers in its place"),
    Row("apply_residual_connection_post_layernorm", OFF, _HEEDED_BY_NOTHING),
    Row("openai_gelu", OFF, _HEEDED_BY_NOTHING),
    Row("onnx_safe", OFF, _HEEDED_BY_NOTHING),
    Row("spec", (None,), "a module that can be imported and a name in it", _unknown_spec),
    Row("qk_l2_norm", OFF, _NEEDS_TE, lambda args: _local(args) and not args.num_experts),
    Row(
        "attention_backend",
        ("auto", "local", "unfused"),
        "auto with --transformer-impl local, or --core-attention sdpa",
        _local,
    ),
    Row("use_flash_attn", OFF, "no --use-flash-attn with --transformer-impl local, or --core-attention sdpa", _local),
    Row("tp_comm_overlap_cfg", OFF, "--tp-comm-overlap beside it", lambda args: not args.tp_comm_overlap),
    Row("window_attn_skip_freq", OFF, "--window-size beside it", lambda args: args.window_size is None),
    Row("moe_layer_freq", (1,), "--num-experts beside it", lambda args: not args.num_experts),
    Row(
        "test_mode",
        OFF,
        "--qk-layernorm and LayerNorm beside it, without --sla: nothing else is tested",
        _no_layernorm_of_keys,
    ),
    *(Row(name, OFF, _NEEDS_TE, _local) for name in _OF_TE),
    # What other models have; Megatron's defaults are fine.
    Row("mask_prob", (0.15,), _GPTS_ONLY),
    Row("short_seq_prob", (0.1,), _GPTS_ONLY),
    Row("titles_data_path", OFF, _GPTS_ONLY),
    Row("vision_pretraining", OFF, _GPTS_ONLY),
)

_POSITIONS = (
    *(
        Row(name, fine, "--position-embedding-type yarn beside it, or --rope-scaling-factor", _not_yarn)
        for name, fine in (
            ("rotary_scaling_factor", (1.0,)),
            ("mscale", (1.0,)),
            ("mscale_all_dim", (0.0,)),
            ("yarn_original_max_position_embeddings", (None,)),
            ("yarn_beta_fast", (None,)),
            ("yarn_beta_slow", (None,)),
        )
    ),
    Row("rotary_base", (10000,), _NEEDS_ROPE, _not_rotary),
    Row("rotary_percent", (1.0,), _NEEDS_ROPE, _not_rotary),
    Row("rotary_interleaved", OFF, _NEEDS_ROPE, _not_rotary),
    Row("rotary_seq_len_interpolation_factor", OFF, _NEEDS_ROPE, _not_rotary),
    Row("use_rope_scaling", OFF, _NEEDS_ROPE, lambda args: _positions(args) != "rope"),
    Row(
        "rope_scaling_factor",
        (rope_scaling.UPSTREAMS,),
        "--use-rope-scaling beside it",
        lambda args: not args.use_rope_scaling,
    ),
    Row(
        "reset_position_ids",
        OFF,
        "--reset-attention-mask beside it: only learned positions look at position ids",
        lambda args: _positions(args) != "learned_absolute" and not args.reset_attention_mask,
    ),
    Row(
        "reset_attention_mask",
        OFF,
        "--transformer-impl local: Transformer Engine's attention is causal over all documents",
        _attention_of_te,
    ),
    Row(
        "reset_attention_mask",
        OFF,
        "--no-masked-softmax-fusion beside it: the fused kernel makes a mask of its own",
        _fused_softmax,
    ),
    Row(
        "reset_attention_mask",
        OFF,
        "no --window-size beside it: it makes a mask of its own",
        lambda args: args.window_size,
    ),
    Row(
        "reset_attention_mask",
        OFF,
        "no --no-create-attention-mask-in-dataloader beside it",
        lambda args: not args.create_attention_mask_in_dataloader,
    ),
)

#: Documents in one sample, and conversations.
_PACKED = (
    *(
        Row(name, OFF, "no such flag beside --dataloader-inter-document-masking or --sft: these do it", _packed)
        for name in ("reset_attention_mask", "reset_position_ids")
    ),
    *(
        Row(
            name,
            OFF,
            "--micro-batch-size 1 or --core-attention sdpa beside it with a pipeline: for Transformer Engine samples "
            "are put one after the other, and stages expect them side by side",
            lambda args: args.micro_batch_size != 1 and args.pipeline_model_parallel_size > 1 and not _sdpa(args),
        )
        for name in ("dataloader_inter_document_masking", "sft")
    ),
    Row(
        "dataloader_inter_document_masking",
        OFF,
        "--core-attention sdpa beside it with context parallelism: Transformer Engine takes each document to be split "
        "over the ranks, Megatron splits the sequence",
        lambda args: args.context_parallel_size > 1 and not _sdpa(args),
    ),
    *(
        Row(name, OFF, "no --cuda-graph-impl full_iteration: documents end elsewhere in each step", _step_is_a_graph)
        for name in ("dataloader_inter_document_masking", "sft")
    ),
    Row("sft", OFF, "--tokenizer-type SFTTokenizer beside it", lambda args: args.tokenizer_type != "SFTTokenizer"),
    Row("sft", OFF, "--data-path FILE.jsonl beside it, no --mock-data", lambda args: args.mock_data),
    Row(
        "sft",
        OFF,
        "--no-create-attention-mask-in-dataloader or --core-attention sdpa beside it",
        lambda args: args.create_attention_mask_in_dataloader and not _sdpa(args),
    ),
    Row(
        "mtp_num_layers",
        OFF,
        "no --mtp-num-layers with documents in one sample and --core-attention sdpa: Megatron moves tokens on over "
        "documents' ends",
        lambda args: _packed(args) and _sdpa(args),
    ),
)

_FAILS_LATE = (
    *(
        Row(name, OFF, f"no {flag_of(name)} without a GPU", lambda args: cpu_backend_is_active())
        for name in ("log_straggler", "gpu_sniff_test_interval", "record_memory_history", "async_save")
    ),
    Row(
        "mtp_num_layers",
        OFF,
        "--untie-embeddings-and-output-weights beside it, or a --pipeline-model-parallel-layout with m before the "
        "last stage: Megatron cannot save tied weights where the last stage has both",
        lambda args: not args.untie_embeddings_and_output_weights and _further_tokens_on_the_last_stage(args),
    ),
    Row(
        "check_for_spiky_loss",
        OFF,
        "no --check-for-spiky-loss with --cuda-graph-impl full_iteration: a graph looks at no loss",
        _step_is_a_graph,
    ),
    Row(
        "timing_log_level",
        (0,),
        "0 with --cuda-graph-impl full_iteration: timers inside a step wait for the GPU",
        _step_is_a_graph,
    ),
    Row(
        "fp32_residual_connection",
        OFF,
        "no --fp32-residual-connection without a GPU: torch's norms take one type",
        lambda args: cpu_backend_is_active(),
    ),
    Row(
        "pipeline_model_parallel_layout",
        (None,),
        "m on another rank than the first: Megatron does not keep that rank's two embeddings equal",
        _further_tokens_on_the_first_rank,
    ),
    Row(
        "inprocess_restart",
        OFF,
        "no --inprocess-restart without GPUs: nothing wakes a rank on gloo that waits for one that failed",
        lambda args: cpu_backend_is_active() and args.world_size > 1,
    ),
    Row(
        "fine_grained_activation_offloading",
        OFF,
        "--recompute-granularity selective or none beside it: Megatron empties what is to be computed again from",
        lambda args: args.recompute_granularity == "full",
    ),
    Row("moe_use_upcycling", OFF, "no --moe-use-upcycling: Megatron cannot load a model built in this way for it"),
    Row("moe_paged_stash", OFF, "no --moe-paged-stash: it needs kernels and a dispatcher of its own"),
    Row(
        "config_logger_dir",
        (*OFF, ""),
        "no --config-logger-dir: Megatron cannot write a configuration with process groups",
    ),
    Row("adlr_autoresume", OFF, "no --adlr-autoresume: it needs NVIDIA's own cluster"),
    Row("fake_process_group", OFF, "no --fake-process-group: it trains nothing"),
    Row("lazy_mpu_init", OFF, "no --lazy-mpu-init: it is another trainer's"),
    Row("use_ring_exchange_p2p", OFF, "no --use-ring-exchange-p2p: it needs a torch of NVIDIA's own"),
    Row(
        "init_model_with_meta_device",
        OFF,
        "no --init-model-with-meta-device without Megatron-FSDP: the weights would stay as memory was, or nowhere",
        lambda args: not args.use_megatron_fsdp,
    ),
    Row(
        "num_experts",
        OFF,
        "--disable-bias-linear beside it: what Megatron's local experts do with a bias, torch refuses",
        lambda args: _local(args) and args.add_bias_linear and not (args.moe_grouped_gemm or args.sequence_parallel),
    ),
    Row(
        "num_experts",
        OFF,
        "--disable-bias-linear or --no-bias-gelu-fusion beside it: Megatron's experts have no fused gelu",
        _fused_gelu,
    ),
    Row(
        "num_experts",
        OFF,
        "--sequence-parallel beside it, with tensor parallelism: Megatron's experts do not train without",
        lambda args: args.tensor_model_parallel_size > 1 and not args.sequence_parallel,
    ),
    Row(
        "moe_router_topk",
        (2,),
        "at most as many as --num-experts",
        lambda args: args.moe_router_topk > (args.num_experts or args.moe_router_topk),
    ),
    Row(
        "expert_model_parallel_size",
        (1,),
        "a size that with --expert-tensor-parallel-size and --pipeline-model-parallel-size divides the processes",
        lambda args: args.world_size % _ranks_of_experts(args),
    ),
    Row(
        "quick_geglu",
        OFF,
        "--disable-bias-linear or --no-bias-gelu-fusion beside it: a dense layer has no fused kernel for it",
        lambda args: args.bias_gelu_fusion and args.add_bias_linear,
    ),
    Row("init_method_xavier_uniform", OFF, "no --init-method-xavier-uniform: Megatron cannot build a model with it"),
    Row(
        "lr_decay_style",
        ("constant", "linear", "cosine", "inverse-square-root"),
        "--lr-wsd-decay-iters or --lr-wsd-decay-samples beside it",
        lambda args: args.lr_wsd_decay_iters is None and args.lr_wsd_decay_samples is None,
    ),
    Row("eval_interval", (None,), "an integer >= 1", lambda args: args.eval_interval < 1 and not args.full_validation),
    Row("log_interval", (100,), "an integer >= 1", lambda args: args.log_interval < 1),
    Row("tensorboard_log_interval", (1,), "an integer >= 1", lambda args: args.tensorboard_log_interval < 1),
    Row(
        "logits_save_dir",
        OFF,
        "no --logits-save-dir with a pipeline: all stages but the last have no logits",
        lambda args: args.pipeline_model_parallel_size > 1,
    ),
    Row(
        "full_validation",
        OFF,
        "--multiple-validation-sets beside it, for one set too",
        lambda args: not args.multiple_validation_sets,
    ),
    Row("multiple_validation_sets", OFF, "--full-validation beside it", lambda args: not args.full_validation),
    Row(
        "validation_set_names",
        OFF,
        "--multiple-validation-sets beside it",
        lambda args: not args.multiple_validation_sets,
    ),
    Row(
        "ckpt_format",
        ("torch_dist", "torch", "fsdp_dtensor"),
        "torch_dist: what Megatron saves as torch_dcp it cannot load",
    ),
    Row(
        "use_torch_fsdp2",
        OFF,
        "--no-load-optim or --finetune beside it, with --load: Megatron does not load torch's Adam into FSDP2",
        _loads_torchs_adam,
    ),
    Row("save", (None,), "--save-interval beside it", lambda args: not args.save_interval),
    Row("wandb_project", (None, ""), "--wandb-exp-name beside it", lambda args: not args.wandb_exp_name),
    Row(
        "wandb_project",
        (None, ""),
        "--save or --wandb-save-dir beside it",
        lambda args: not (args.save or args.wandb_save_dir),
    ),
    Row("wandb_exp_name", (None, ""), "--wandb-project beside it", lambda args: not args.wandb_project),
    Row(
        "async_save",
        OFF,
        "--use-persistent-ckpt-worker beside it: without, Megatron saves as without --async-save",
        lambda args: not args.use_persistent_ckpt_worker,
    ),
)

#: All of them, in the order in which they are asked.
ROWS: tuple[Row, ...] = (*_NO_EFFECT, *_POSITIONS, *_PACKED, *_FAILS_LATE)
