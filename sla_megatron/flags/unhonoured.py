"""Flags that Megatron accepts and that then do nothing, or that end a run in a traceback long after it started.

Each is refused in one line, before anything starts: by this project's entry point, with ``--sla`` or without, and in a
script of one's own with ``--sla``.  The rows say what was seen with Megatron 0.19.2.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace

from ..common.errors import OFF, flag_of
from ..cpu.backend import cpu_backend_is_active
from .asked import hybrid_pattern, is_local
from .hybrid import HYBRID
from .rows import Row
from .unhonoured_layers import LAYERS
from .unhonoured_positions import DOCUMENTS, POSITIONS

_NEEDS_TE = "--transformer-impl transformer_engine beside it: local layers do not heed it"
_HEEDED_BY_NOTHING = "no such flag: nothing in Megatron heeds it"
# What only Transformer Engine's layers do; without a GPU some of it is refused before, in cpu.flags.
_OF_TE = ("fp8", "fp4", "tp_comm_overlap", "delay_wgrad_compute", "use_transformer_engine_op_fuser")
_OF_TE += ("use_te_activation_func", "te_precision_config_file", "use_grouped_gemm_for_dense_mlp")
_OF_TE += ("cpu_offloading_num_layers", "multi_latent_attention")
_GPTS_ONLY = "no such flag: it is not for GPTs"


def _no_layernorm_of_keys(args: Namespace) -> bool:
    return args.sla or not args.qk_layernorm or args.normalization != "LayerNorm"


def _unknown_spec(args: Namespace) -> bool:
    """Whether ``--spec MODULE NAME`` names nothing; upstream logs that, and builds its default."""
    try:
        module, name = args.spec
        getattr(importlib.import_module(module), name)
    except Exception:
        # Of whatever kind: the module is the user's, and may do anything when it is imported.
        return True
    return False


def _loads_torchs_adam(args: Namespace) -> bool:
    """Whether a checkpoint's optimizer is to be loaded, and nobody's but torch's is installed."""
    loads = args.load and args.optimizer == "adam" and not (args.no_load_optim or args.finetune)
    others = ("transformer_engine", "apex")
    return loads and (cpu_backend_is_active() or not any(map(importlib.util.find_spec, others)))


_NO_EFFECT = (
    Row("freeze_all_layers", OFF, "no --freeze-all-layers: Megatron trains all layers of a model built in this way"),
    Row("create_all_gather_group", OFF, "no such flag: a model built in this way does not heed it"),
    Row("rampup_batch_size", OFF, "--step-batch-size-schedule in its place: Megatron ignores this one"),
    Row("exit_signal_handler_for_dataloader", OFF, "--exit-signal-handler in its place: nothing heeds this one"),
    Row(
        "mtp_hybrid_override_pattern",
        OFF,
        "--mtp-num-layers in its place: Megatron ignores this one in a GPT",
        lambda args: hybrid_pattern(args) is None,
    ),
    Row("decoder_num_layers", OFF, "--num-layers in its place"),
    Row("apply_residual_connection_post_layernorm", OFF, _HEEDED_BY_NOTHING),
    Row("openai_gelu", OFF, _HEEDED_BY_NOTHING),
    Row("onnx_safe", OFF, _HEEDED_BY_NOTHING),
    Row("spec", (None,), "a module that can be imported and a name in it", _unknown_spec),
    Row("qk_l2_norm", OFF, _NEEDS_TE, lambda args: is_local(args) and not args.num_experts),
    Row(
        "attention_backend",
        ("auto", "local", "unfused"),
        "auto with --transformer-impl local, or --core-attention sdpa",
        is_local,
    ),
    Row("use_flash_attn", OFF, "no --use-flash-attn with --transformer-impl local, or --core-attention sdpa", is_local),
    Row("tp_comm_overlap_cfg", OFF, "--tp-comm-overlap beside it", lambda args: not args.tp_comm_overlap),
    Row("window_attn_skip_freq", OFF, "--window-size beside it", lambda args: args.window_size is None),
    Row("moe_layer_freq", (1,), "--num-experts beside it", lambda args: not args.num_experts),
    Row(
        "test_mode",
        OFF,
        "--qk-layernorm and LayerNorm beside it, without --sla: nothing else is tested",
        _no_layernorm_of_keys,
    ),
    *(Row(name, OFF, _NEEDS_TE, is_local) for name in _OF_TE),
    # What other models have; Megatron's defaults are fine.
    Row("mask_prob", (0.15,), _GPTS_ONLY),
    Row("short_seq_prob", (0.1,), _GPTS_ONLY),
    Row("titles_data_path", OFF, _GPTS_ONLY),
    Row("vision_pretraining", OFF, _GPTS_ONLY),
)

_FAILS_LATE = (
    *(
        Row(name, OFF, f"no {flag_of(name)} without a GPU", lambda args: cpu_backend_is_active())
        for name in ("log_straggler", "gpu_sniff_test_interval", "record_memory_history", "async_save")
    ),
    Row(
        "fp32_residual_connection",
        OFF,
        "no --fp32-residual-connection without a GPU: torch's norms take one type",
        lambda args: cpu_backend_is_active(),
    ),
    Row(
        "inprocess_restart",
        OFF,
        "no --inprocess-restart without GPUs: nothing wakes a rank on gloo that waits for one that failed",
        lambda args: cpu_backend_is_active() and args.world_size > 1,
    ),
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
ROWS: tuple[Row, ...] = (*_NO_EFFECT, *HYBRID, *POSITIONS, *DOCUMENTS, *LAYERS, *_FAILS_LATE)
