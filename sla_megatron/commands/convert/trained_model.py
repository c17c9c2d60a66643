"""The model that was trained, in this process: from the checkpoint's own arguments, by Megatron's own loading.

Nothing here knows what an export understands.  The stored arguments go to Megatron's model builder as they are, but for
what a process of one rank on a CPU has to have otherwise: parallelism, precision, kernels; and the weights come by
``dist_checkpointing.load``.  So whatever an export drops shows in the logits.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

from ...common.errors import flag_of, last_line
from ...common.patterns import kinds
from ...common.silence import silence
from ...flags.asked import hybrid_pattern
from .checkpoint_arguments import whole
from .errors import ConvertError
from .megatron_model import build, sharded_state, sharded_tensors
from .megatron_reader import MegatronSource, stored_tensors

# Arguments that are others here than in training, and change no function: one rank's, fp32's, those of kernels that a
# CPU has, and none of what is for a backward pass, for first weights or for a record.
PARALLELISM: Mapping[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "transformer_pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "hierarchical_context_parallel_sizes": None,
    "hybrid_context_parallel": False,
    "max_seqlen_per_dp_cp_rank": None,
    "cp_comm_type": ["p2p"],
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "tensor_parallel_num_weight_shards": None,
    "expert_tensor_parallel_num_weight_shards": None,
    "gtp_weight_remat_size": 1,
    "expert_gtp_weight_remat_size": 1,
    "sequence_parallel": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "microbatch_group_size_per_vp_stage": None,
    "overlap_p2p_comm": False,
    "overlap_p2p_comm_warmup_flush": False,
    "use_ring_exchange_p2p": False,
    "tp_comm_overlap": False,
    "tp_comm_overlap_cfg": None,
    "defer_embedding_wgrad_compute": False,
    "delay_wgrad_compute": False,
    "overlap_moe_expert_parallel_comm": False,
    "overlap_dispatch_backward_with_experts_wgrad": False,
    "ep_overlap_early_attn_memory_release": False,
    "symmetric_ar_type": None,
}

PRECISION: Mapping[str, Any] = {
    "fp16": False,
    "bf16": False,
    "params_dtype": torch.float32,
    "fp32_residual_connection": False,
    "fp16_lm_cross_entropy": False,
    "fp8": None,
    "fp8_param_gather": False,
    "fp8_output_proj": False,
    "fp4": None,
    "fp4_param_gather": False,
    "first_last_layers_bf16": False,
    "te_precision_config_file": None,
    "kitchen_config_file": None,
    "kitchen_recipe_number": None,
}

KERNELS: Mapping[str, Any] = {
    "transformer_impl": "local",
    "core_attention": "megatron",
    "flash_attention_version": None,
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
    "fused_residual_rmsnorm": False,
    "use_te_activation_func": False,
    "use_transformer_engine_op_fuser": False,
    "use_kitchen_attention": False,
    "deterministic_mode": False,
    "batch_invariant_mode": False,
    "flash_decode": False,
    "inference_fuse_tp_communication": False,
    "inference_disable_triton_nvls_kernels": False,
}

TRAINING_ALONE: Mapping[str, Any] = {
    "cuda_graph_impl": "none",
    "cuda_graph_modules": [],
    "inference_cuda_graph_scope": None,
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": None,
    "distribute_saved_activations": False,
    "cpu_offloading": False,
    "cpu_offloading_num_layers": 0,
    "fine_grained_activation_offloading": False,
    "offload_modules": [],
    "use_cpu_initialization": True,
    "init_model_with_meta_device": False,
    "config_logger_dir": "",
    "log_max_attention_logit": False,
    "qk_clip": False,
    "test_mode": False,
}

HERE: Mapping[str, Any] = {**PARALLELISM, **PRECISION, **KERNELS, **TRAINING_ALONE}

# What Megatron's layers of torch do not do, so that the model would be another one in silence: attribute, and why.
_NOT_HERE: Mapping[str, str] = {
    "yaml_cfg": "the arguments do not say what model the file described",
    "qk_l2_norm": "Megatron's layers of torch do not have it",
    "use_grouped_gemm_for_dense_mlp": "Megatron's layers of torch do not have it",
}


def trained_model(source: MegatronSource) -> Any:
    """Megatron's model of the checkpoint ``source``, in fp32, in evaluation mode.  Call within ``megatron_alone``.

    Raises:
        ConvertError: where Megatron cannot build it on a CPU, or the weights are not those of the model.
    """
    args = args_here(whole(source.args), source.path)
    try:
        with silence():
            model = build(args)
    except Exception as error:
        raise ConvertError(
            f"{source.path}: Megatron's model of these arguments cannot be built on a CPU, and so not be compared: "
            f"{last_line(error)}"
        ) from error
    load(model, source.path)
    return model


def args_here(stored: Namespace, path: Path) -> Namespace:
    """A checkpoint's arguments for one rank on a CPU, in fp32.  Raises ``ConvertError`` for a model that it has not."""
    from megatron.core.transformer.enums import AttnBackend

    for name, why in _NOT_HERE.items():
        if getattr(stored, name, None):
            raise ConvertError(f"{path}: {flag_of(name)} cannot be computed here: {why}")
    if not stored.swiglu and not (stored.bias_gelu_fusion and stored.add_bias_linear):
        # Transformer Engine's GELU is the tanh approximation; without fusion torch's is exact.
        for name in ("use_te_activation_func", "use_transformer_engine_op_fuser"):
            if getattr(stored, name):
                raise ConvertError(f"{path}: {flag_of(name)} cannot be computed here: its activation is another")
    args = Namespace(**{**vars(stored), **HERE, "attention_backend": AttnBackend.auto})
    # One rank has all layers: where a pipeline's stages end does not count.
    if (pattern := hybrid_pattern(stored)) is not None:
        args.hybrid_layer_pattern = kinds(pattern)
    if getattr(args, "padded_vocab_size", None) is None:
        args.padded_vocab_size = stored_tensors(path)["embedding.word_embeddings.weight"].size[0]
    return args


def load(model: Any, folder: Path, passed_over: tuple[str, ...] = ()) -> None:
    """Megatron's own loading of a checkpoint into what this rank has of a model, on all ranks at once.

    All that is stored of a model must be on some rank, but for keys that begin as one of ``passed_over`` does.

    Raises:
        ConvertError: on all ranks.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    try:
        with silence():
            # How the layers were stored; checkpoints from before it have none.
            metadata = dist_checkpointing.load_content_metadata(str(folder)) or {}
            state = dist_checkpointing.load({"model": sharded_state(model, metadata)}, str(folder))
            model.load_state_dict(state["model"])
    except (Exception, CheckpointException) as error:
        raise ConvertError(
            f"{folder}: Megatron cannot load it into the model of its arguments: {last_line(error)}"
        ) from error
    wanted: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(wanted, {key for key, *_ in sharded_tensors(model, metadata)[1]})
    left = [key for key in sorted(set(stored_tensors(folder)).difference(*wanted)) if not key.startswith(passed_over)]
    if left:
        raise ConvertError(f"{folder}: the model of its arguments has no tensor {left[0]}")
