"""Of the flags in ``unhonoured.py`` those of experts, of layers that predict further tokens, of how layers are run."""

from __future__ import annotations

from argparse import Namespace

from ..common.errors import OFF
from .asked import is_local, step_is_a_graph
from .rows import Row


def _fused_gelu(args: Namespace) -> bool:
    fused = args.bias_gelu_fusion and args.add_bias_linear
    return fused and not (args.swiglu or args.quick_geglu or args.squared_relu or args.moe_grouped_gemm)


def _ranks_of_experts(args: Namespace) -> int:
    """Ranks that hold all experts of a pipeline once."""
    tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return args.expert_model_parallel_size * tensor * args.pipeline_model_parallel_size


def _further_tokens_on_the_last_stage(args: Namespace) -> bool:
    """Whether the last of several pipeline stages has the layers of ``--mtp-num-layers``."""
    layout = args.pipeline_model_parallel_layout
    return args.pipeline_model_parallel_size > 1 and (layout is None or "m" in layout.rpartition("|")[2])


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


LAYERS = (
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
        step_is_a_graph,
    ),
    Row(
        "timing_log_level",
        (0,),
        "0 with --cuda-graph-impl full_iteration: timers inside a step wait for the GPU",
        step_is_a_graph,
    ),
    Row(
        "pipeline_model_parallel_layout",
        (None,),
        "m on another rank than the first: Megatron does not keep that rank's two embeddings equal",
        _further_tokens_on_the_first_rank,
    ),
    Row(
        "fine_grained_activation_offloading",
        OFF,
        "--recompute-granularity selective or none beside it: Megatron empties what is to be computed again from",
        lambda args: args.recompute_granularity == "full",
    ),
    Row(
        "num_experts",
        OFF,
        "--disable-bias-linear beside it: what Megatron's local experts do with a bias, torch refuses",
        lambda args: is_local(args) and args.add_bias_linear and not (args.moe_grouped_gemm or args.sequence_parallel),
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
    Row("moe_use_upcycling", OFF, "no --moe-use-upcycling: Megatron cannot load a model built in this way for it"),
    Row("moe_paged_stash", OFF, "no --moe-paged-stash: it needs kernels and a dispatcher of its own"),
)
