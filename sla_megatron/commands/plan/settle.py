"""Pretraining's flags, settled by Megatron, as a :class:`Job`.  Nothing of Megatron is imported before it is called."""

from __future__ import annotations

import io
import math
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

from ...cpu.device import add_device_arg, megatron_device
from ...pipeline.payload import MicrobatchShape
from .compute import ModelWork
from .flags import add_plan_args
from .job import Job, PlanError
from .program import Communication

#: What the tokenizers that bring their own vocabulary hold, as far as a plan can know.
_VOCABULARIES = {"GPT2BPETokenizer": 50257}


def settled_job() -> Job:
    """The run that ``sys.argv`` describes.

    Raises:
        FlagError: for a flag that pretraining would refuse, or one of ``sla-plan``.
        PlanError: for what Megatron's validation refuses, and without ``--sla``.
    """
    # The run is another machine's: this one need not have its GPU.
    with ExitStack() as stack:
        # Megatron's modules warn of what this machine lacks.
        with warnings.catch_warnings(action="ignore"):
            stack.enter_context(megatron_device(["--device", "cpu"]))
            from megatron.training.argument_utils import core_transformer_config_from_args

            from ...flags.validation import sla_config_from_args, training_batch_sizes
            from ...model.report import describe
            from ...pipeline.megatron_layout import pipeline_layout

        with _quietly(), _in_one_line():
            args = _settled_args()
            config = core_transformer_config_from_args(args)
        sla = sla_config_from_args(args)
        return Job(
            sla=sla,
            layout=pipeline_layout(config),
            shape=microbatch_shape(args),
            work=model_work(args),
            element_bytes=config.pipeline_dtype.itemsize,
            num_gpus=args.world_size,
            global_batch_size=training_batch_sizes(args)[-1],
            group_size=args.microbatch_group_size_per_vp_stage,
            expert_gpus=args.expert_model_parallel_size * args.expert_tensor_parallel_size,
            communication=Communication(args.sla_plan_overlap, args.overlap_p2p_comm_warmup_flush),
            description=describe(sla),
        )


def _settled_args() -> Namespace:
    from ...flags.arguments import settled_args

    def check(args: Namespace) -> None:
        if not args.sla:
            raise PlanError("without --sla only hidden states cross between pipeline stages: add --sla to plan for it")
        args.rank, args.world_size = 0, args.num_gpus or fewest_gpus(args)
        # Validation switches it off without virtual stages; layouts that have them are suggested too.
        args.sla_plan_overlap = args.overlap_p2p_comm
        # Megatron's default, which needs Transformer Engine here and changes no figure.
        args.apply_rope_fusion = False

    return settled_args(
        _provider, args_defaults={"tokenizer_type": "GPT2BPETokenizer"}, check=check, will_run_here=False
    )


def _provider(parser: ArgumentParser) -> ArgumentParser:
    parser.prog = "sla-plan"
    return add_plan_args(add_device_arg(parser))


@contextmanager
def _quietly() -> Iterator[None]:
    """Drop what Megatron prints while it settles flags, unless it ends the program with it, as ``--help`` does."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    except SystemExit:
        sys.stdout.write(printed.getvalue())
        raise


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Turn what Megatron's validation raises into a :class:`PlanError`."""
    try:
        yield
    except (AssertionError, ValueError, NotImplementedError, ImportError) as error:
        # An assertion without a message says in its own code what it wants.
        text = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
        raise PlanError(f"Megatron does not accept these flags: {' '.join(text.split())}") from error


def fewest_gpus(args: Namespace) -> int:
    """The smallest world size that the parallel sizes divide."""
    pipeline = args.pipeline_model_parallel_size
    dense = args.tensor_model_parallel_size * args.context_parallel_size
    experts = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or args.tensor_model_parallel_size)
    return math.lcm(dense, experts) * pipeline


def microbatch_shape(args: Namespace) -> MicrobatchShape:
    """The sizes of a microbatch, of Megatron's validated arguments."""
    return MicrobatchShape(
        sequence_length=args.decoder_seq_length or args.seq_length,
        microbatch_size=args.micro_batch_size,
        hidden_size=args.hidden_size,
        head_size=args.kv_channels,
        tensor_parallel_size=args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        sequence_parallel=args.sequence_parallel,
    )


def model_work(args: Namespace) -> ModelWork:
    """What decides a model's compute, of Megatron's validated arguments."""
    recompute = "none"
    if args.recompute_granularity == "full":
        recompute = "full"
    elif args.recompute_granularity == "selective" and "core_attn" in (args.recompute_modules or ["core_attn"]):
        recompute = "attention"
    return ModelWork(
        num_heads=args.num_attention_heads,
        mlp_weights=tuple(_mlp_weights(args, layer) for layer in range(args.num_layers)),
        output_gate=bool(args.attention_output_gate),
        vocabulary=_vocabulary(args),
        recompute=recompute,
        recomputed_layers=args.recompute_num_layers if args.recompute_method == "block" else None,
    )


def _mlp_weights(args: Namespace, layer: int) -> int:
    """The MLP weights that one token meets in ``layer``, which counts from 0."""
    matrices = 3 if args.swiglu else 2
    frequency = args.moe_layer_freq
    is_moe = args.num_experts and (frequency[layer] if isinstance(frequency, list) else layer % frequency == 0)
    if not is_moe:
        return matrices * args.hidden_size * args.ffn_hidden_size
    width = args.moe_router_topk * (args.moe_ffn_hidden_size or args.ffn_hidden_size)
    inner = args.moe_latent_size or args.hidden_size
    shared = args.moe_shared_expert_intermediate_size or 0
    latent = 2 * args.hidden_size * args.moe_latent_size if args.moe_latent_size else 0
    return matrices * (inner * width + args.hidden_size * shared) + latent


def _vocabulary(args: Namespace) -> int:
    if args.padded_vocab_size:
        return args.padded_vocab_size
    size = args.vocab_size or _VOCABULARIES.get(args.tokenizer_type, 0)
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-size // multiple) * multiple
