"""A forward and a backward pass of the tiny model, by Megatron's own schedule, over the job's own process groups."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

from ...common.silence import silence
from .finding import Fault, Skipped
from .job import sharding
from .tiny import num_microbatches, on_one_process, tiny_args

SEED = 1

#: Names the step that a rank is at, to say where it hangs.
Reached = Callable[[str], None]


def layout(
    args: Namespace,
    store: Any,
    seconds: float,
    launched: bool,
    reached: Reached = lambda step: None,
    then: Callable[[], None] = lambda: None,
) -> str:
    """Loss and gradients of one batch are there and finite.

    Without a launcher this is one process, and the model one stage.

    Args:
        args: the job's, validated.
        store: for the process group; not used for anything else.
        seconds: how long the ranks may take; torch's own time limits are set beyond that.
        then: called when all is well, while the process groups are there.

    Raises:
        Fault: if they are not.
    """
    if args.use_megatron_fsdp or args.use_torch_fsdp2:
        raise Skipped("not run with FSDP")
    start = time.monotonic()
    with silence():
        tiny = tiny_args(args if launched else on_one_process(args))
    with silence(), model_parallel(tiny, store, seconds, reached):
        reached("building the model")
        model = build(tiny)
        reached("forward and backward")
        losses = run_batch(tiny, model, num_microbatches(tiny))
        reached("looking at the gradients")
        tensors = checked_gradients(model)
        # Only the last stage knows the loss.
        loss = f"loss {checked_loss(losses):.3f}, " if losses else ""
        taken = time.monotonic() - start
        del model
        then()
    shape = sharding(tiny) if launched else "one process, not the job's layout"
    return f"{shape}: {loss}gradients of {tensors} tensors finite; {taken:.1f} s"


@contextmanager
def model_parallel(args: Namespace, store: Any, seconds: float, reached: Reached) -> Iterator[None]:
    """Megatron's process groups, as its trainer makes them; all are destroyed on leaving."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from ...training.further_tokens import embedding_ranks

    backend = args.distributed_backend
    if backend == "nccl":
        torch.cuda.set_device(args.local_rank)
    reached("meeting in a process group")
    # Beyond the time limit of the ranks: what that says is clearer.
    limit = timedelta(seconds=seconds + 60)
    torch.distributed.init_process_group(
        backend, store=store, rank=args.rank, world_size=args.world_size, timeout=limit
    )
    try:
        reached("making Megatron's groups")
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            pipeline_model_parallel_comm_backend=args.pipeline_model_parallel_comm_backend,
            context_parallel_size=args.context_parallel_size,
            hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
            get_embedding_ranks=partial(embedding_ranks, args),
            distributed_timeout_minutes=int(limit.total_seconds() // 60) + 1,
            nccl_communicator_config_path=args.nccl_communicator_config_path,
            order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
            create_gloo_process_groups=args.use_gloo_process_groups,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(SEED, args.te_rng_tracker)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build(args: Namespace) -> list[Any]:
    """This rank's stages, wrapped as the trainer wraps them, each with gradient buffers."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_model_config
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from ...model.builder import model_config_from_args

    config = model_config_from_args(args)
    # There is no optimizer that would gather parameters.
    ddp = replace(
        pretrain_cfg_container_from_args(args, config).ddp, overlap_param_gather=False, align_param_gather=False
    )
    model = config.get_builder_cls()(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), ddp_config=ddp, data_parallel_random_init=False
    )
    settings = get_model_config(model[0])
    settings.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        # As the trainer sets it.
        no_sync = [chunk.no_sync for chunk in model]
        settings.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return model


def run_batch(args: Namespace, model: list[Any], microbatches: int) -> list[float]:
    """Forward and backward of random tokens; the mean loss of each of ``microbatches``, on the last stage."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    # Ranks that share a batch draw the same tokens.
    generator = torch.Generator().manual_seed(SEED + parallel_state.get_data_parallel_rank())
    for chunk in model:
        chunk.zero_grad_buffer()
    outputs = get_forward_backward_func()(
        forward_step_func=partial(forward_step, args, generator),
        data_iterator=[None] * len(model) if len(model) > 1 else None,
        model=model if len(model) > 1 else model[0],
        num_microbatches=microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=False,
    )
    return [float(output["loss"]) for output in outputs]


def forward_step(
    args: Namespace, generator: Any, data_iterator: None, chunk: Any, return_schedule_plan: bool = False
) -> tuple[Any, Callable[..., Any]]:
    """One microbatch through one stage, or a plan for it, as Megatron's schedules call it."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    size = (args.micro_batch_size, args.seq_length + 1)
    drawn = torch.randint(args.padded_vocab_size, size, generator=generator).cuda()
    batch = {
        "tokens": drawn[:, :-1].contiguous(),
        "labels": drawn[:, 1:].contiguous(),
        "position_ids": torch.arange(args.seq_length, device="cuda").expand(size[0], -1),
    }
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    forward = chunk.build_schedule_plan if return_schedule_plan else chunk
    output = forward(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, total_loss


def total_loss(losses: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Sum of the token losses ``[b, s]``, how many there are, and their mean for the report."""
    import torch

    count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return losses.float().sum(), count, {"loss": losses.detach().float().mean()}


def checked_loss(losses: list[float]) -> float:
    """The mean of ``losses``.  Raises :class:`Fault` unless each is finite."""
    for number, loss in enumerate(losses):
        if loss != loss or abs(loss) == float("inf"):
            raise Fault(f"the loss of microbatch {number} is {loss}: expected a finite number")
    return sum(losses) / len(losses)


def checked_gradients(model: list[Any]) -> int:
    """How many tensors have gradients.

    Raises:
        Fault: unless all of them are there and finite, and each stage has one that is not zero.
    """
    import torch

    count = 0
    for number, chunk in enumerate(model):
        named = [(name, each) for name, each in chunk.named_parameters() if each.requires_grad]
        flows = not named
        for name, parameter in named:
            gradient = getattr(parameter, "main_grad", None)
            gradient = parameter.grad if gradient is None else gradient
            if gradient is None:
                raise Fault(f"{name.removeprefix('module.')} has no gradient")
            if not bool(torch.isfinite(gradient).all()):
                raise Fault(f"the gradient of {name.removeprefix('module.')} is not finite")
            flows = flows or bool((gradient != 0).any())
        if not flows:
            raise Fault(f"all gradients of this rank's virtual stage {number} are zero")
        count += len(named)
    return count
