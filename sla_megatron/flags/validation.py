"""What goes with ``--sla``: every check of the other flags beside it, before any process group exists.

What the ``--sla`` flags themselves say is in ``skipping.py``.

Each refusal is a :class:`~sla_megatron.FlagError`: one line with the flag, its value and what is accepted.
"""

from __future__ import annotations

from argparse import Namespace

from ..common.errors import OFF, FlagError, Refusal, flag_of, refuse
from ..pipeline.schedule import Schedule
from . import dev
from .asked import layer_numbers
from .hybrid import WITH_SLA
from .pruned_rows import check_projection
from .rows import refuse_rows
from .skipping import SLA_SETTINGS, num_query_groups, resolve_settings, sla_config_from_args

_GRAPHED_LAYERS = "graphs of single layers neither take nor return other layers' K/V"

# Megatron options that do not go with --sla: attribute, values that are fine, what the message says is accepted.
_REFUSED: tuple[Refusal, ...] = (
    ("multi_latent_attention", OFF, "no multi-latent attention with --sla: there are no K/V groups to share"),
    ("experimental_attention_variant", OFF, "no experimental attention with --sla"),
    ("linear_attention_freq", OFF, "no linear attention with --sla"),
    ("heterogeneous_layers_config_path", OFF, "equal layers with --sla"),
    ("heterogeneous_layers_config_encoded_json", OFF, "equal layers with --sla"),
    ("qk_clip", OFF, "no --qk-clip with --sla: it rescales a layer's own keys by logits that came from others"),
    (
        "cuda_graph_impl",
        (*OFF, "none", "full_iteration"),
        f"none or full_iteration with --sla: {_GRAPHED_LAYERS}",
    ),
    ("enable_cuda_graph", OFF, f"--cuda-graph-impl full_iteration with --sla: {_GRAPHED_LAYERS}"),
    ("external_cuda_graph", OFF, f"--cuda-graph-impl full_iteration with --sla: {_GRAPHED_LAYERS}"),
    (
        "cpu_offloading_num_layers",
        OFF,
        "0 with --sla: Transformer Engine itself chooses what to empty; --fine-grained-activation-offloading works",
    ),
    ("use_megatron_fsdp", OFF, "no Megatron-FSDP with --sla, with which it was not tried; --use-torch-fsdp2 works"),
    ("perform_rl_step", OFF, "no reinforcement learning with --sla: Megatron-side generation is not supported"),
    ("transformer_impl", ("local", "transformer_engine"), "local or transformer_engine with --sla"),
    ("hybrid_context_parallel", OFF, "no --hybrid-context-parallel with --sla"),
)

# The same of options that Megatron has from 0.20 on.
_REFUSED_FROM_0_20: tuple[Refusal, ...] = (
    ("enable_mhc_connections", OFF, "no hyper-connections with --sla: a pipeline's hidden states have another width"),
)


def refuse_unsupported(args: Namespace) -> None:
    """Raise :class:`FlagError` for a Megatron option that does not go with ``--sla``; needs no validated arguments."""
    if args.sla:
        # First: validation makes other options of a pattern's symbols.
        refuse_rows(args, WITH_SLA)
        refuse(args, (*_REFUSED, *_REFUSED_FROM_0_20, *dev.REFUSED))
        dev.refuse_overlap_of_experts(args)


def resolve_sla_args(args: Namespace) -> None:
    """Check the ``--sla`` flags of validated Megatron arguments and fill in their defaults, in place.

    Raises:
        FlagError: for a value out of range, a combination that is not supported, or ``--sla-*`` without ``--sla``.
    """
    if not args.sla:
        for name in SLA_SETTINGS:
            if getattr(args, name) is not None:
                raise FlagError(flag_of(name), getattr(args, name), "--sla beside it")
        return
    # Again, since Megatron's validation derives some options from others.
    refuse_unsupported(args)
    resolve_settings(args)
    _check_positions(args)
    _check_parallelism(args)
    _check_pipeline(args)
    check_projection(args)
    _check_recomputation(args)
    _check_cuda_graph(args)


def _check_recomputation(args: Namespace) -> None:
    if args.recompute_granularity == "selective" and "mlp" in (args.recompute_modules or []) and args.add_bias_linear:
        # Upstream's checkpoint returns the bias parameter as an output of its autograd function, which makes the
        # parameter a child of that function; backward then calls itself without end.  So it does without --sla.
        raise FlagError("--recompute-modules", args.recompute_modules, "no mlp, or --disable-bias-linear beside it")


def _check_cuda_graph(args: Namespace) -> None:
    if getattr(args, "cuda_graph_impl", "none") != "full_iteration":
        return
    if args.cuda_graph_warmup_steps < 1:
        raise FlagError(
            "--cuda-graph-warmup-steps",
            args.cuda_graph_warmup_steps,
            "1 or more with --sla: the first step compares the ranks' settings, which no graph can hold",
        )
    if args.pipeline_model_parallel_size > 1 and not args.overlap_p2p_comm:
        raise FlagError(
            "--cuda-graph-impl",
            args.cuda_graph_impl,
            "none with a pipeline that is not interleaved or overlaps no communication: upstream then waits for the "
            "GPU at each exchange, which no graph can hold",
        )


def _check_positions(args: Namespace) -> None:
    """K is rotated by its reader: what a layer without rotary embedding reads must come from one without."""
    pattern = args.no_rope_freq
    if not pattern:
        return
    sla, numbers = sla_config_from_args(args), layer_numbers(args)
    if isinstance(pattern, int):
        pattern = [layer % pattern == 0 for layer in range(1, numbers.num_layers + 1)]
    # Upstream counts layers of every kind.  Of another length: it says so.
    rotated = {layer: pattern[numbers.in_stack(layer) - 1 :][:1] for layer in range(1, sla.num_layers + 1)}
    for layer in sla.consumer_layers:
        for source in sorted({sla.source_of(layer, group, "key") for group in sla.skip_groups}):
            if rotated[layer] != rotated[source]:
                raise FlagError(
                    "--no-rope-freq",
                    args.no_rope_freq,
                    "rotary embedding in both or in neither of two layers that share keys with --sla, as where "
                    f"--sla-skip-distance is a multiple of it: layer {layer} reads layer {source}'s",
                )


def _check_parallelism(args: Namespace) -> None:
    groups, size = num_query_groups(args), args.tensor_model_parallel_size
    if groups % size:
        raise FlagError(
            "--tensor-model-parallel-size",
            size,
            f"a divisor of the {groups} K/V groups with --sla: each rank holds whole groups",
        )
    if getattr(args, "gtp_weight_remat_size", 1) > 1:
        raise FlagError("--tensor-parallel-num-weight-shards", args.gtp_weight_remat_size, "1 with --sla")


def _check_pipeline(args: Namespace) -> None:
    if args.pipeline_model_parallel_size == 1:
        return
    if args.fp32_residual_connection:
        raise FlagError(
            "--fp32-residual-connection",
            True,
            "no --fp32-residual-connection with --sla and a pipeline: hidden states and K/V travel as one type",
        )
    if args.overlap_moe_expert_parallel_comm and _relays_without_layers(args.pipeline_model_parallel_layout):
        raise FlagError(
            "--pipeline-model-parallel-layout",
            args.pipeline_model_parallel_layout,
            "a layer in each stage between others with --sla and --overlap-moe-expert-parallel-comm",
        )
    flag = "--global-batch-size" if args.step_batch_size_schedule is None else "--step-batch-size-schedule"
    batches = [(flag, size, args.micro_batch_size) for size in training_batch_sizes(args)]
    batches.append(("--eval-global-batch-size", args.eval_global_batch_size, args.eval_micro_batch_size))
    for flag, batch_size, microbatch_size in batches:
        try:
            Schedule(
                args.pipeline_model_parallel_size,
                args.virtual_pipeline_model_parallel_size or 1,
                batch_size // (microbatch_size * args.data_parallel_size),
                args.microbatch_group_size_per_vp_stage,
            )
        except ValueError as error:
            raise FlagError(flag, batch_size, f"another size: {error}") from None


def _relays_without_layers(layout: str | None) -> bool:
    """Whether ``--pipeline-model-parallel-layout`` has a stage without a layer between stages that have some."""
    if layout is None:
        return False
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    stages = PipelineParallelLayerLayout.parse_str_to_list(layout)
    filled = [index for index, stage in enumerate(stages) if LayerType.decoder in stage]
    return len(filled) < filled[-1] - filled[0] + 1


def training_batch_sizes(args: Namespace) -> list[int]:
    """Samples of a training step, in the order in which they are used; ``--rampup-batch-size`` is ignored upstream."""
    if args.step_batch_size_schedule is not None:
        from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator as Steps

        return [size for _, size in Steps._parse_schedule(args.step_batch_size_schedule, args.seq_length)]
    samples = args.micro_batch_size * args.data_parallel_size
    if args.decrease_batch_size_if_needed:
        return [args.global_batch_size // samples * samples]
    return [args.global_batch_size]
