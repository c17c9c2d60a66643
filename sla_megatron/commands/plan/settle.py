"""Pretraining's flags, settled by Megatron, as a :class:`Job`.  Nothing of Megatron is imported before it is called."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from warnings import catch_warnings

from ...attention.sla_config import SLAConfig, describe
from ...common.errors import StartError
from ...common.patterns import EXPERTS, MLP, kinds
from ...common.silence import silence
from ...cpu.device import add_device_arg, megatron_device
from ...flags.asked import fewest_gpus
from ...flags.skipping import num_attention_layers, num_query_groups, sla_config_from_args
from ...flags.validation import training_batch_sizes
from ...model.parameters import Uncounted, model_parameters
from ...model.weights import mlp_weights, of_kinds
from ...pipeline.layout import PipelineLayout
from ...pipeline.payload import MicrobatchShape
from .compute import ModelWork
from .flags import add_plan_args
from .job import Job, Parameters, PlanError
from .mixers import mixers
from .program import Communication

#: What the tokenizers that bring their own vocabulary hold, as far as a plan can know.
_VOCABULARIES = {"GPT2BPETokenizer": 50257}

#: The tokenizer of a run that names none.
TOKENIZER = "GPT2BPETokenizer"


def require_sla(args: Namespace) -> None:
    """Raise :class:`PlanError` without ``--sla``."""
    if not args.sla:
        raise PlanError("without --sla only hidden states cross between pipeline stages: add --sla to plan for it")


def settled_job() -> Job:
    """The run that ``sys.argv`` describes.

    Raises:
        FlagError: for a flag that pretraining would refuse, or one of ``sla-plan``.
        MegatronRefusal: for what Megatron does not accept.
        PlanError: without ``--sla``.
    """
    # The run is another machine's: this one need not have its GPU.  Megatron's modules warn of what it lacks.
    with catch_warnings(action="ignore"), megatron_device(["--device", "cpu"]):
        from megatron.training.argument_utils import core_transformer_config_from_args

        from ...flags.arguments import megatron_refusals, settled_args
        from ...flags.hybrid import HYBRID
        from ...flags.rows import refuse_rows
        from ...model.builder import model_config_from_args

        def check(args: Namespace) -> None:
            require_sla(args)
            args.rank, args.world_size = 0, args.num_gpus or fewest_gpus(args)
            # Validation switches it off without virtual stages; layouts that have them are suggested too.
            args.sla_plan_overlap = args.overlap_p2p_comm
            # Megatron's default, which needs Transformer Engine here and changes no figure.
            args.apply_rope_fusion = False
            # Of a pattern that Megatron builds otherwise than it says there is no plan.
            refuse_rows(args, HYBRID)

        args = settled_args(
            lambda parser: add_plan_args(add_device_arg(parser)),
            args_defaults={"tokenizer_type": TOKENIZER},
            check=check,
            will_run_here=False,
            silent=True,
        )
        with silence(), megatron_refusals():
            config = core_transformer_config_from_args(args)
            parameters = counted_parameters(args, model_config_from_args)
            # Stages are counted last, and what does not divide into them is refused only there.
            return replace(job_of(args, config, args.sla_plan_overlap), parameters=parameters)


def job_of(args: Namespace, config: Any, overlap: bool) -> Job:
    """The run of Megatron's validated arguments and the ``TransformerConfig`` made of them.

    Without ``--sla`` it is a run in which nothing skips.  ``overlap`` is ``--overlap-p2p-communication`` as it was
    before validation, which switches it off without virtual stages.
    """
    from ...pipeline.megatron_layout import hybrid_layout, pipeline_layout

    ends = config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage
    size, pattern = args.pipeline_model_parallel_size, args.hybrid_layer_pattern
    layout = pipeline_layout(config) if pattern is None else hybrid_layout(pattern, size, *ends)
    return job_in(layout, args, config, (config.pipeline_dtype or config.params_dtype).itemsize, overlap)


def job_in(layout: PipelineLayout, args: Namespace, config: Any, element_bytes: int, overlap: bool) -> Job:
    """:func:`job_of` where the layout, and the bytes of an element that crosses a hop, are known.  Pure Python."""
    sla, pattern = sla_config_from_args(args), args.hybrid_layer_pattern
    if sla is None:
        layers = num_attention_layers(args)
        sla = SLAConfig(layers, num_query_groups(args), (layers,), 0)
    return Job(
        sla=sla,
        layout=layout,
        shape=microbatch_shape(args),
        work=model_work(args, config),
        element_bytes=element_bytes,
        num_gpus=args.world_size,
        global_batch_size=training_batch_sizes(args)[-1],
        group_size=args.microbatch_group_size_per_vp_stage,
        expert_gpus=args.expert_model_parallel_size * args.expert_tensor_parallel_size,
        communication=Communication(overlap, args.overlap_p2p_comm_warmup_flush),
        description=describe(sla, is_hybrid=pattern is not None),
    )


def microbatch_shape(args: Namespace) -> MicrobatchShape:
    """The sizes of a microbatch, of Megatron's validated arguments."""
    return MicrobatchShape(
        sequence_length=args.decoder_seq_length or args.seq_length,
        microbatch_size=args.micro_batch_size,
        hidden_size=args.hidden_size,
        tensor_parallel_size=args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        sequence_parallel=args.sequence_parallel,
    )


def model_work(args: Namespace, config: Any) -> ModelWork:
    """What decides a model's compute, of Megatron's validated arguments and the ``TransformerConfig`` made of them."""
    recompute = "none"
    if args.recompute_granularity == "full":
        recompute = "full"
    elif args.recompute_granularity == "selective" and "core_attn" in (args.recompute_modules or ["core_attn"]):
        recompute = "attention"
    layers = kinds(args.hybrid_layer_pattern or "")
    found = of_kinds(config, layers) if layers else config
    return ModelWork(
        num_heads=args.num_attention_heads,
        head_size=args.kv_channels,
        mlp_weights=tuple(
            mlp_weights(found, layer, args.moe_router_topk) if not layers or layers[layer] in (MLP, EXPERTS) else 0
            for layer in range(args.num_layers)
        ),
        output_gate=bool(args.attention_output_gate),
        vocabulary=_vocabulary(args),
        recompute=recompute,
        recomputed_layers=args.recompute_num_layers if args.recompute_method == "block" else None,
        kinds=layers,
        mixers=mixers(config) if layers else {},
    )


def counted_parameters(args: Namespace, model_of: Callable[[Namespace], Any]) -> Parameters | None:
    """``None`` for a vocabulary that no flag tells, and a model that is not counted or not built here.

    ``model_of``: the model's configuration, of arguments.
    """
    args = copy.copy(args)
    args.padded_vocab_size = _vocabulary(args)
    if not args.padded_vocab_size:
        return None

    def counted(projection: str) -> int:
        args.sla_kv_projection = projection
        return model_parameters(model_of(args))

    try:
        return Parameters(counted("full"), counted("pruned"))
    except (Uncounted, StartError):
        return None


def _vocabulary(args: Namespace) -> int:
    if args.padded_vocab_size:
        return args.padded_vocab_size
    size = args.vocab_size or _VOCABULARIES.get(args.tokenizer_type, 0)
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-size // multiple) * multiple
