"""The job's flags, settled as the job will settle them."""

from __future__ import annotations

from argparse import Namespace

from ...common.errors import FlagError, StartError
from ...common.patterns import attention_layers
from ...cpu.device import add_device_arg
from .finding import Fault
from .flags import add_doctor_args
from .place import Place


def job_args(place: Place, num_gpus: int | None, on_cpu: bool) -> Namespace:
    """Megatron's validated arguments of the job that ``sys.argv`` describes.

    Args:
        place: the world size is this process's, or without a launcher ``num_gpus`` or the fewest that fit.
        num_gpus: the world size to assume without a launcher.
        on_cpu: whether the job itself will run in the CPU backend, which is active then.

    Raises:
        Fault: for the first thing that Megatron or this project does not accept.
    """
    from ...flags.arguments import settled_args
    from ...flags.asked import fewest_gpus
    from ...flags.entry_point import require_pretraining
    from ...flags.fused_kernels import switch_off_missing_kernels

    def check(args: Namespace) -> None:
        if place.launched:
            args.rank, args.world_size = place.rank, place.world_size
            if num_gpus not in (None, place.world_size):
                raise FlagError("--num-gpus", num_gpus, f"the job's world size, {place.world_size}, or nothing")
        else:
            args.rank, args.world_size = 0, num_gpus or fewest_gpus(args)
        require_pretraining(args)
        switch_off_missing_kernels(args)

    try:
        return settled_args(
            lambda parser: add_doctor_args(add_device_arg(parser)),
            args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
            check=check,
            will_run_here=on_cpu,
            silent=True,
        )
    except StartError as error:
        raise Fault(error.reason) from error


def sharding(args: Namespace) -> str:
    """``TP 2 x PP 4 x VPP 2``: how validated arguments divide the ranks; experts divide those of a stage once more."""
    parts = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "VPP": args.virtual_pipeline_model_parallel_size or 1,
        "CP": args.context_parallel_size,
        "DP": args.data_parallel_size,
    }
    shown = " x ".join(f"{name} {size}" for name, size in parts.items() if size > 1) or "one rank"
    if args.expert_model_parallel_size > 1:
        shown += f", experts TP {args.expert_tensor_parallel_size} x EP {args.expert_model_parallel_size}"
    return shown


def sizes(args: Namespace) -> str:
    """How the world size divides; it does, or Megatron's validation would have raised."""
    microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    return (
        f"world size {args.world_size}: {sharding(args)}; {_layers(args)}, {args.num_attention_heads} heads; "
        f"{args.global_batch_size} samples a step, {microbatches} microbatches of {args.micro_batch_size} a pipeline"
    )


def _layers(args: Namespace) -> str:
    pattern = args.hybrid_layer_pattern
    return f"{args.num_layers} layers" + (
        f" {pattern}, {len(attention_layers(pattern))} of attention" if pattern else ""
    )
