"""Pretraining's flags, settled where Megatron is not installed, as a :class:`Job`.  Pure Python, no torch.

Restates what ``megatron.training.arguments:validate_args`` and ``TransformerConfig`` of Megatron 0.19.2 derive from the
flags in ``known_flags.py``, and what they have against them; of flags that are passed over it is not known here.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...common.errors import FlagError, flag_of
from ...flags.asked import fewest_gpus
from ...flags.skipping import num_query_groups, sla_config_from_args
from ...flags.validation import resolve_sla_args
from ...pipeline.layout import PipelineLayout
from .job import Job
from .known_flags import parsed
from .settle import TOKENIZER, counted_parameters, job_in, require_sla

#: What flags mean that are refused here, where they are not given.
_ELSEWHERE: dict[str, Any] = {
    **dict.fromkeys(("hybrid_layer_pattern", "decoder_seq_length", "no_rope_freq", "step_batch_size_schedule")),
    **dict.fromkeys(("pipeline_model_parallel_layout", "recompute_modules", "fp8", "fp4", "mtp_num_layers")),
    **dict.fromkeys(("decrease_batch_size_if_needed", "fp32_residual_connection", "multi_latent_attention"), False),
    **dict.fromkeys(("overlap_moe_expert_parallel_comm", "attention_output_gate", "qk_l2_norm"), False),
    "moe_layer_freq": 1,
}
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings")


def settled_job(argv: Sequence[str]) -> Job:
    """The run that ``argv`` describes.

    Raises:
        FlagError: for a value that pretraining would refuse.
        PlanError: without ``--sla``.
        StartError: for a flag that is not known here.
    """
    args = parsed(argv)
    vars(args).update(_ELSEWHERE)
    require_sla(args)
    overlap = args.overlap_p2p_comm
    args.expert_tensor_parallel_size = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    args.world_size = args.num_gpus or fewest_gpus(args)
    for fill_in in (_batch, _shape, _recomputation, _experts, _virtual_stages):
        fill_in(args)
    layout = PipelineLayout.of_sizes(args.pipeline_model_parallel_size, _stages(args))
    resolve_sla_args(args)
    job = job_in(layout, args, _config(args), 2 if args.bf16 or args.fp16 else 4, overlap)
    return replace(job, parameters=counted_parameters(args, _model))


def _require(args: Namespace, name: str, fine: object, accepted: str) -> None:
    if not fine:
        raise FlagError(flag_of(name), getattr(args, name), accepted)


def _batch(args: Namespace) -> None:
    _require(args, "micro_batch_size", args.micro_batch_size, "an integer >= 1")
    model = args.tensor_model_parallel_size * args.context_parallel_size * args.pipeline_model_parallel_size
    _require(args, "num_gpus", args.world_size % model == 0, f"a multiple of {model}, TP x CP x PP")
    args.data_parallel_size = args.world_size // model
    args.global_batch_size = args.global_batch_size or args.micro_batch_size * args.data_parallel_size
    args.eval_global_batch_size, args.eval_micro_batch_size = args.global_batch_size, args.micro_batch_size


def _shape(args: Namespace) -> None:
    for name in _REQUIRED:
        _require(args, name, getattr(args, name), "an integer >= 1")
    heads, size = args.num_attention_heads, args.tensor_model_parallel_size
    _require(args, "num_attention_heads", heads % size == 0, f"a multiple of --tensor-model-parallel-size {size}")
    divides = args.kv_channels or args.hidden_size % heads == 0
    _require(args, "hidden_size", divides, f"a multiple of --num-attention-heads {heads}")
    args.kv_channels = args.kv_channels or args.hidden_size // heads
    pieces = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    _require(args, "seq_length", args.seq_length % pieces == 0, f"a multiple of {pieces}, 2 x CP")
    longest = args.max_position_embeddings
    _require(args, "max_position_embeddings", longest >= args.seq_length, f"{args.seq_length}, --seq-length, or more")
    _require(args, "fp16", not (args.fp16 and args.bf16), "no --bf16 beside it")
    if args.ffn_hidden_size is None:
        args.ffn_hidden_size = int(4 * args.hidden_size * 2 / 3 / 64) * 64 if args.swiglu else 4 * args.hidden_size
    args.sequence_parallel = args.sequence_parallel and size > 1
    args.tokenizer_type = args.tokenizer_type or TOKENIZER


def _recomputation(args: Namespace) -> None:
    if args.recompute_activations:
        args.recompute_granularity = "selective"
    whole = args.recompute_granularity == "full"
    _require(args, "recompute_granularity", not whole or args.recompute_method, "--recompute-method beside it")
    _require(args, "recompute_granularity", not whole or args.recompute_num_layers, "--recompute-num-layers beside it")
    if args.recompute_granularity == "selective":
        _require(args, "recompute_method", not args.recompute_method, "--recompute-granularity full beside it")
        _require(args, "recompute_num_layers", not args.recompute_num_layers, "--recompute-granularity full beside it")


def _experts(args: Namespace) -> None:
    size, count = args.expert_model_parallel_size, args.num_experts
    if count is None:
        _require(args, "expert_model_parallel_size", size == 1, "--num-experts beside it")
        _require(args, "moe_ffn_hidden_size", args.moe_ffn_hidden_size is None, "--num-experts beside it")
        return
    _require(args, "num_experts", count % size == 0, f"a multiple of --expert-model-parallel-size {size}")
    _require(args, "moe_router_topk", 1 < args.moe_router_topk <= count, f"an integer from 2 to {count}")
    unbiased = not args.add_bias_linear or args.expert_tensor_parallel_size == 1
    _require(args, "expert_tensor_parallel_size", unbiased, "1, or --disable-bias-linear beside it")


def _virtual_stages(args: Namespace) -> None:
    """Both ways to ask for them, as their number; none are ``None``."""
    of_layers, count = args.num_layers_per_virtual_pipeline_stage, args.num_virtual_stages_per_pipeline_rank
    if of_layers:
        name = "num_layers_per_virtual_pipeline_stage"
        uneven = args.decoder_first_pipeline_num_layers or args.decoder_last_pipeline_num_layers
        _require(args, name, not (count or uneven), "--num-virtual-stages-per-pipeline-rank alone in its place")
        count, left = divmod(max(_layers_of_ranks(args)), of_layers)
        _require(args, name, not left, f"a divisor of {max(_layers_of_ranks(args))}, the layers of a rank")
    args.virtual_pipeline_model_parallel_size = None if count == 1 else count
    if args.virtual_pipeline_model_parallel_size is None:
        args.overlap_p2p_comm = False
    least = 2 if args.overlap_p2p_comm else 3
    enough = args.virtual_pipeline_model_parallel_size is None or args.pipeline_model_parallel_size >= least
    _require(args, "pipeline_model_parallel_size", enough, f"{least} or more with virtual stages")
    if args.overlap_p2p_comm_warmup_flush and not args.overlap_p2p_comm:
        raise FlagError("--overlap-p2p-communication-warmup-flush", True, "virtual stages and overlap beside it")


def _layers_of_ranks(args: Namespace) -> list[int]:
    """Of each pipeline rank, the embedding and the loss counted where flags ask for it."""
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    given = [size for size in (first, last) if size]
    counted = args.num_layers + args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    _require(args, "num_layers", not given or counted == args.num_layers, "ends that are counted or given, not both")
    middle, ranks = counted - sum(given), args.pipeline_model_parallel_size - len(given)
    divides = ranks >= 0 and (middle > 0 and middle % ranks == 0 if ranks else middle == 0)
    what = f"layers that divide over {ranks} pipeline ranks" + (" between the ends" if given else "")
    _require(args, "num_layers", divides, what)
    return [*([first] if first else []), *([middle // ranks] * ranks if ranks else []), *([last] if last else [])]


def _stages(args: Namespace) -> list[int]:
    """The layers of each virtual stage."""
    chunks, ranks = args.virtual_pipeline_model_parallel_size or 1, _layers_of_ranks(args)
    divide = all(layers % chunks == 0 for layers in ranks)
    _require(args, "num_virtual_stages_per_pipeline_rank", divide, f"a divisor of {', '.join(map(str, ranks))} layers")
    stages = [layers // chunks for _ in range(chunks) for layers in ranks]
    stages[0] -= args.account_for_embedding_in_pipeline_split
    stages[-1] -= args.account_for_loss_in_pipeline_split
    return stages


def _config(args: Namespace) -> Namespace:
    """What of Megatron's ``TransformerConfig`` operations and parameters are counted by."""
    derived = {"gated_linear_unit": args.swiglu, "num_moe_experts": args.num_experts}
    return Namespace(**vars(args) | derived | {"num_query_groups": num_query_groups(args)})


def _model(args: Namespace) -> Namespace:
    """What of Megatron's ``GPTModelConfig`` parameters are counted by."""
    return Namespace(
        transformer=_config(args),
        vocab_size=args.padded_vocab_size,
        should_pad_vocab=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        seq_length=args.max_position_embeddings,
        sla=sla_config_from_args(args),
    )
