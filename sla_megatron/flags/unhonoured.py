"""Flags that Megatron accepts and that then do nothing, or that end a run in a traceback long after it started.

Each is refused in one line, before anything starts: by this project's entry point, with ``--sla`` or without, and in a
script of one's own with ``--sla``.  The rows say what was seen with Megatron 0.19.2.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from ..common.errors import OFF, FlagError, flag_of
from ..cpu.backend import cpu_backend_is_active
from . import rope_scaling
from .sla_flags import MEGATRON

_NEEDS_ROPE = "--position-embedding-type rope beside it"
_NEEDS_TE = "--transformer-impl transformer_engine beside it: local layers do not heed it"
_HEEDED_BY_NOTHING = "no such flag: nothing in Megatron heeds it"
_GPTS_ONLY = "no such flag: it is not for GPTs"


@dataclass(frozen=True)
class Row:
    """A flag whose value must be one of ``fine`` ``when`` the other flags, as they were parsed, are so."""

    name: str
    fine: tuple[Any, ...]
    accepted: str
    when: Callable[[Namespace], Any] = lambda args: True


def _local(args: Namespace) -> bool:
    return args.transformer_impl == "local"


def _positions(args: Namespace) -> str:
    return "rope" if args.use_rotary_position_embeddings else args.position_embedding_type


def _not_rotary(args: Namespace) -> bool:
    return _positions(args) not in ("rope", "yarn", "mrope") and not args.multi_latent_attention


def _attention_of_te(args: Namespace) -> bool:
    names_local = args.attention_backend.name == "local" and not args.num_experts
    return args.transformer_impl == "transformer_engine" and not names_local


def _fused_softmax(args: Namespace) -> bool:
    """Whether the kernel that makes its own mask may stand in for Megatron's local attention."""
    megatrons = getattr(args, "core_attention", MEGATRON) == MEGATRON
    return (args.bf16 or args.fp16) and args.masked_softmax_fusion and megatrons


def _fused_gelu(args: Namespace) -> bool:
    fused = args.bias_gelu_fusion and args.add_bias_linear
    return fused and not (args.swiglu or args.quick_geglu or args.squared_relu or args.moe_grouped_gemm)


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


def _can_be_made(folder: str) -> bool:
    """Whether the folder is there, or what is there of its path is a folder, and may be written to."""
    if "://" in folder:
        return True
    path = Path(folder).absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def _empty_middle(args: Namespace) -> bool:
    """Whether a stage of ``--pipeline-model-parallel-layout``, neither the first nor the last, has no layer."""
    stages = PipelineParallelLayerLayout.parse_str_to_list(args.pipeline_model_parallel_layout)
    return not all(stages[1:-1])


_NO_EFFECT = (
    Row("freeze_all_layers", OFF, "no --freeze-all-layers: Megatron trains all layers of a model built in this way"),
    Row("create_all_gather_group", OFF, "no such flag: a model built in this way does not heed it"),
    Row("rampup_batch_size", OFF, "--step-batch-size-schedule in its place: Megatron ignores this one"),
    Row("exit_signal_handler_for_dataloader", OFF, "--exit-signal-handler in its place: nothing heeds this one"),
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
    Row(
        "test_mode",
        OFF,
        "--qk-layernorm and LayerNorm beside it, without --sla: nothing else is tested",
        _no_layernorm_of_keys,
    ),
    # What only Transformer Engine's layers do; without a GPU some of it is refused before (cpu.flags).
    *(
        Row(name, OFF, _NEEDS_TE, _local)
        for name in ("fp8", "fp4", "tp_comm_overlap", "delay_wgrad_compute", "use_transformer_engine_op_fuser")
    ),
    *(
        Row(name, OFF, _NEEDS_TE, _local)
        for name in ("use_te_activation_func", "te_precision_config_file", "use_grouped_gemm_for_dense_mlp")
    ),
    *(Row(name, OFF, _NEEDS_TE, _local) for name in ("cpu_offloading_num_layers", "multi_latent_attention")),
    # What other models have; Megatron's defaults are fine.
    Row("mask_prob", (0.15,), _GPTS_ONLY),
    Row("short_seq_prob", (0.1,), _GPTS_ONLY),
    Row("titles_data_path", OFF, _GPTS_ONLY),
    Row("vision_pretraining", OFF, _GPTS_ONLY),
)

_POSITIONS = (
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

_FAILS_LATE = (
    *(
        Row(name, OFF, f"no {flag_of(name)} without a GPU", lambda args: cpu_backend_is_active())
        for name in ("log_straggler", "gpu_sniff_test_interval", "record_memory_history", "async_save")
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
        "no --init-model-with-meta-device without FSDP: the weights would stay as memory was",
        lambda args: not (args.use_megatron_fsdp or args.use_torch_fsdp2),
    ),
    Row(
        "num_experts",
        OFF,
        "--disable-bias-linear or --no-bias-gelu-fusion beside it: Megatron's experts have no fused gelu",
        _fused_gelu,
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
    Row("eval_interval", (None,), "an integer >= 1", lambda args: args.eval_interval < 1),
    Row(
        "logits_save_dir",
        OFF,
        "no --logits-save-dir with a pipeline: all stages but the last have no logits",
        lambda args: args.pipeline_model_parallel_size > 1,
    ),
    Row(
        "pipeline_model_parallel_layout",
        (None,),
        "a layer in each stage between the first and the last",
        _empty_middle,
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


def _without(package: str, needs: Callable[[Namespace], Any] = lambda args: True) -> Callable[[Namespace], Any]:
    return lambda args: needs(args) and importlib.util.find_spec(package) is None


_NVRX = "nvidia_resiliency_ext"
_NEEDS_NVRX = "the package nvidia-resiliency-ext, which is not installed"

_NOT_INSTALLED = (
    Row(
        "optimizer",
        ("adam", "sgd"),
        "adam or sgd: the package emerging-optimizers is not installed",
        _without("emerging_optimizers"),
    ),
    Row("wandb_project", (None, ""), "the package wandb, which is not installed", _without("wandb")),
    Row("log_straggler", OFF, "the package nvidia-ml-py, which is not installed", _without("pynvml")),
    Row("log_energy", OFF, "the package nvidia-ml-py, which is not installed", _without("pynvml")),
    Row(
        "run_workload_inspector_server",
        OFF,
        "the package workload-inspector, which is not installed",
        _without("workload_inspector"),
    ),
    Row("enable_ft_package", OFF, _NEEDS_NVRX, _without(_NVRX)),
    Row("fault_injector_ranks", OFF, _NEEDS_NVRX, _without(_NVRX)),
    Row("fault_injector_num_ranks", OFF, _NEEDS_NVRX, _without(_NVRX)),
    Row("non_persistent_ckpt_type", (None, "global"), f"global, or {_NEEDS_NVRX}", _without(_NVRX)),
    Row(
        "async_save",
        OFF,
        f"--async-strategy mcore, or {_NEEDS_NVRX}",
        _without(_NVRX, lambda args: args.async_strategy == "nvrx"),
    ),
    *(
        Row(name, OFF, "Transformer Engine, which is not installed", _without("transformer_engine"))
        for name in ("save_activations_interval", "save_dgrads_interval")
    ),
)

#: What a run needs to start; where it is not to start, as in a sweep that is planned, the rest may come later.
AT_START = (
    Row(
        "eval_interval",
        (),
        "an integer >= 1",
        lambda args: not args.eval_interval and not (args.full_validation or args.skip_train),
    ),
    Row("save", (None,), "a folder that can be made there", lambda args: not _can_be_made(args.save)),
    Row(
        "tensorboard_dir",
        (None,),
        "a folder that can be made there",
        lambda args: not _can_be_made(args.tensorboard_dir),
    ),
)

#: All others, in the order in which they are asked.
ROWS: tuple[Row, ...] = (*_NO_EFFECT, *_POSITIONS, *_FAILS_LATE, *_NOT_INSTALLED)


def refuse_unhonoured(args: Namespace, rows: Iterable[Row] = ROWS) -> None:
    """Raise :class:`FlagError` for the first flag that would not do what it says; needs no validated arguments."""
    for row in rows:
        value = getattr(args, row.name, None)
        # Of an enumeration the name is what a user typed.
        value = getattr(value, "name", value)
        if value not in row.fine and row.when(args):
            raise FlagError(flag_of(row.name), value, row.accepted)
