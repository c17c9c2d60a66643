"""The seams with Megatron's pipeline schedules: each run of one gets a communicator that knows every payload's shape.

Upstream's schedules stay as they are.  They accept a communicator; they are looked up in their own module, where they
are wrapped, so that every training loop is served, Megatron's or a user's.  A model that has nothing but hidden states
between its stages passes straight through.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from ..upstream.adapters.process_groups import SCHEDULE_GROUPS, schedule_groups
from ..upstream.seams import Reliance, SeamError, Wrapping, wrap_once
from .communicator import COMMUNICATOR, PayloadOrder, SLAP2PCommunicator
from .payload import MicrobatchShape
from .routes import RoutePlan
from .schedule import Schedule
from .step import PipelineStep, pipeline_step

#: What the ranks of a pipeline must have in common.
Settings = tuple[RoutePlan, Schedule, MicrobatchShape]

#: A transformer block -> the settings on which the ranks of its pipeline were found to agree.
_agreed: WeakKeyDictionary[Any, set[Settings]] = WeakKeyDictionary()


def carrying_tensors(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """``upstream``, one of Megatron's two pipeline schedules, with what crosses layers carried between its stages."""

    @wraps(upstream)
    def forward_backward(**arguments: Any) -> Any:
        chunk = arguments["model"][0] if isinstance(arguments["model"], list) else arguments["model"]
        block = _block_of(chunk)
        if block is None or block.route_plan.moves_nothing:
            return upstream(**arguments)
        for name in ("p2p_communicator", "adjust_tensor_shapes_fn"):
            if arguments.get(name) is not None:
                raise RuntimeError(f"the schedule was given a {name}, which does not go with tensors that cross layers")
        groups = arguments.get("pg_collection") or schedule_groups()
        config, forward_only = get_model_config(chunk), arguments.get("forward_only", False)
        schedule = _schedule(block.route_plan, config, arguments["num_microbatches"], forward_only)
        shape = MicrobatchShape(
            sequence_length=arguments.get("decoder_seq_length") or arguments["seq_length"],
            microbatch_size=arguments["micro_batch_size"],
            hidden_size=config.hidden_size,
            tensor_parallel_size=groups.tp.size(),
            context_parallel_size=groups.cp.size(),
            sequence_parallel=config.sequence_parallel,
        )
        settings, agreed = (block.route_plan, schedule, shape), _agreed.setdefault(block, set())
        if settings not in agreed:
            require_same_on_all_ranks(settings, groups.pp)
            agreed.add(settings)
        communicator = SLAP2PCommunicator(
            groups.pp, config, _payload_order(*settings, groups.pp.rank(), groups.tp.rank())
        )
        with pipeline_step(PipelineStep(shape, forward_only)):
            result = upstream(**arguments | {"p2p_communicator": communicator, "pg_collection": groups})
        communicator.require_exhausted()
        return result

    return forward_backward


def _block_of(model_chunk: Any) -> Any:
    """The chunk's transformer block if it is one with a route plan, else ``None``."""
    try:
        decoder = get_attr_wrapped_model(model_chunk, "decoder")
    except RuntimeError:
        return None
    return decoder if getattr(decoder, "route_plan", None) is not None else None


def _schedule(plan: RoutePlan, config: Any, num_microbatches: int, forward_only: bool) -> Schedule:
    interleaved = plan.layout.num_chunks > 1
    return Schedule(
        plan.layout.pipeline_size,
        plan.layout.num_chunks,
        num_microbatches,
        config.microbatch_group_size_per_vp_stage if interleaved else None,
        forward_only,
    )


# A run alternates between few of them: training, evaluation, the steps of a batch size that ramps up.
@lru_cache(maxsize=16)
def _payload_order(
    plan: RoutePlan, schedule: Schedule, shape: MicrobatchShape, rank: int, tensor_parallel_rank: int
) -> PayloadOrder:
    """The shapes to come; raises ``SeamError`` if Megatron runs its passes in another order than they assume."""
    if schedule.num_chunks > 1:
        upstream = schedules.get_schedule_table(schedule.num_microbatches, schedule.num_chunks, schedule.group_size)
        if schedule.table() != upstream:
            raise SeamError(f"Megatron's schedule table is {upstream}, expected {schedule.table()}")
    return PayloadOrder.of(plan, schedule, shape, rank, tensor_parallel_rank)


def require_same_on_all_ranks(settings: object, group: dist.ProcessGroup) -> None:
    """Compare ``settings`` over the ranks of the pipeline, before the first run of a schedule with them.

    Ranks that disagree, say by flags that differ between nodes, would wait for tensors of shapes that never come.
    All ranks come here in the same step: a training step, an evaluation, or a step of another batch size is new to all
    of them at once.  Raises ``RuntimeError``, on all of them.
    """
    found: list[str | None] = [None] * group.size()
    dist.all_gather_object(found, repr(settings), group=group)
    if len(set(found)) > 1:
        listed = "\n".join(f"  pipeline rank {rank}: {text}" for rank, text in enumerate(found))
        raise RuntimeError(f"the ranks of one pipeline do not agree on what crosses layers:\n{listed}")


_SCHEDULE_PARAMETERS = (
    "forward_step_func",
    "data_iterator",
    "model",
    "num_microbatches",
    "seq_length",
    "micro_batch_size",
    "decoder_seq_length",
    "forward_only",
    "collect_non_loss_data",
    "first_val_step",
    "adjust_tensor_shapes_fn",
    "p2p_communicator",
    "pg_collection",
    "force_all_reduce",
)

_REASON = "a schedule's own communicator knows one shape for all payloads; other models pass through"

#: Wrapped for the rest of the process when the first stage with traffic is built.
SCHEDULES = tuple(
    Wrapping(
        f"megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_{name}",
        _REASON,
        _SCHEDULE_PARAMETERS,
        wrap=carrying_tensors,
    )
    for name in ("with_interleaving", "without_interleaving")
)

SCHEDULE_HELPERS = (
    Reliance(
        "megatron.core.pipeline_parallel.schedules:get_schedule_table",
        "called to compare the order of passes that the shapes assume with Megatron's",
        ("num_microbatches", "num_model_chunks", "microbatch_group_size_per_vp_stage"),
    ),
    SCHEDULE_GROUPS,
)


def install_transport() -> None:
    """Have Megatron's schedules carry what crosses layers.  Raises ``SeamError`` if upstream changed."""
    for reliance in (*COMMUNICATOR, *SCHEDULE_HELPERS):
        reliance.require()
    wrap_once(SCHEDULES)
