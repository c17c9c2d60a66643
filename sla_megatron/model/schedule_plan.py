"""What crosses layers where Megatron runs them as nodes of a schedule (``--overlap-moe-expert-parallel-comm``).

There the forward pass of one microbatch is interleaved with the backward pass of another, a piece of a layer at a
time, and a block's ``forward`` is not called.  Each microbatch has a plan of its own, made by
``GPTModel.build_schedule_plan``; its tensors live and die with it.

Each node has an autograd graph of its own: it starts from detached inputs, and its backward pass is run by itself, in
the reverse order.  Tensors that go from one node to others therefore wait as those that are resident between stages
do (``pipeline/resident.py``): a reader's backward pass deposits their gradients, the source's collects them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any

import torch
from megatron.core.pipeline_parallel.utils import NoopScheduleNode, ScheduleNode, get_comm_stream, get_comp_stream
from torch import Tensor

from ..pipeline.declarations import CrossLayerTensor, Name
from ..pipeline.resident import ResidentTensors
from ..pipeline.routes import StageTraffic
from ..pipeline.step import current_step
from ..pipeline.waiting import Microbatch, microbatch
from ..upstream.seams import Reliance, Wrapping, wrap_once

_UTILS = "megatron.core.models.common.utils"
_PLAN = "megatron.core.models.common.model_chunk_schedule_plan"


class _BetweenNodes:
    """The tensors of one microbatch that wait, in one block, for later nodes of its plan, and then their gradients.

    Args:
        nodes: how many nodes take each tensor.
    """

    def __init__(self, nodes: Mapping[Name, int]) -> None:
        self._nodes = nodes
        self._resident = ResidentTensors()
        #: Each tensor's pieces, which wait one by one.
        self._parts: dict[Name, list[tuple[Name, int]]] = {}

    def keep(self, held: Microbatch, names: Iterable[Name], output: Tensor) -> Tensor:
        """Take ``names`` from ``held``, for later nodes.  What it returns is the node's, in place of ``output``."""
        parts, pieces = [], []
        for name in names:
            its = held.take(name)
            self._parts[name] = [(name, i) for i in range(len(its))]
            parts += self._parts[name]
            pieces += its
        if not parts:
            return output
        return self._resident.keep(parts, [self._nodes[name] for name, _ in parts], 0, pieces, output)

    def fetch(self, held: Microbatch, names: Iterable[Name], node_input: Tensor) -> None:
        """Put ``names`` into ``held``; ``node_input`` is any input of the node that reads them."""
        parts = [part for name in names for part in self._parts.get(name, [(name, 0)])]
        if parts:
            found: dict[Name, list[Tensor]] = {}
            for (name, _), piece in zip(parts, self._resident.fetch(parts, 0, node_input), strict=True):
                found.setdefault(name, []).append(piece)
            for name, pieces in found.items():
                held.put(name, pieces)

    def require_read(self) -> None:
        """Raise ``RuntimeError`` where a tensor found no reader."""
        self._resident.require_released(forward_only=True)


def _share(
    upstream: Callable[..., Any],
    between: _BetweenNodes,
    reads: tuple[Name, ...],
    makes: tuple[Name, ...],
    traffic: StageTraffic | None,
    node: Any,
    hidden_states: Tensor,
) -> tuple[Tensor, ...] | Tensor:
    """The node with a layer's attention; with ``traffic`` the first of a stage, which is given a payload."""
    with microbatch() as held:
        if traffic is not None:
            hidden_states = _arrive(between, held, traffic, node.chunk_state, hidden_states)
        between.fetch(held, reads, hidden_states)
        outputs = upstream(node, hidden_states)
        if isinstance(outputs, tuple):
            return between.keep(held, makes, outputs[0]), *outputs[1:]
        return between.keep(held, makes, outputs)


def _arrive(
    between: _BetweenNodes, held: Microbatch, traffic: StageTraffic, chunk_state: Any, payload: Tensor
) -> Tensor:
    received = chunk_state.decoder_input
    # It may have been received on the stream that communicates, and is about to be freed.
    payload.record_stream(torch.cuda.current_stream())
    # Their graphs hold on to what arrived until their own backward pass, not until that of the whole stage.
    hidden_states = current_step().enter(traffic, held, payload, keeps_reads=True)
    # What the node was given is another tensor on the same memory; the schedule keeps the one that was received.
    received.data = payload.data
    return between.keep(held, _names(*traffic.arrives, *traffic.fetches), hidden_states)


def _leave(between: _BetweenNodes, traffic: StageTraffic | None, hidden_states: Tensor) -> Tensor:
    """What follows a block's last layer."""
    if traffic is not None:
        going = _names(*traffic.keeps, *traffic.leaves)
        with microbatch(Counter(going)) as held:
            between.fetch(held, dict.fromkeys(going), hidden_states)
            hidden_states = current_step().leave(traffic, held, hidden_states)
        # From there it is sent, and freed.
        hidden_states.record_stream(get_comm_stream())
    between.require_read()
    return hidden_states


class _End(NoopScheduleNode):
    """What follows the last layer where hidden states leave the block as they are: no graph of its own.

    A node's output that is its input would be freed with what was sent, and take its gradient's shape along.
    """

    def __init__(self, leave: Callable[[Tensor], Tensor]) -> None:
        self._leave = leave

    def forward(self, inputs: Tensor) -> Tensor:
        return self._leave(inputs)


def _names(*tensors: CrossLayerTensor) -> tuple[Name, ...]:
    return tuple(tensor.name for tensor in tensors)


def share_between_nodes(plan: Any, decoder: Any) -> None:
    """Have the nodes of ``plan``, one microbatch's in the block ``decoder``, share what crosses layers.

    Raises ``RuntimeError`` for a stage that relays tensors without a layer: between its nodes there is no place for it.
    """
    traffic = None if decoder.traffic is None or decoder.traffic.is_none else decoder.traffic
    if not decoder.layers:
        if traffic is not None:
            raise RuntimeError("a pipeline stage without a layer cannot pass tensors on as a schedule's nodes")
        return
    declared = decoder.declared
    nodes = declared.reads_within([layer.layer_number for layer in decoder.layers])
    if traffic is not None:
        # The last node takes what it sends and what it keeps once.
        nodes += Counter(set(_names(*traffic.keeps, *traffic.leaves)))
    between = _BetweenNodes(nodes)
    for index, layer in enumerate(decoder.layers):
        reads, makes = (_names(*of(layer.layer_number)) for of in (declared.read_by, declared.made_by))
        arrives = traffic if traffic is not None and traffic.stage > 0 and index == 0 else None
        if reads or makes or arrives:
            node = plan.get_layer(index).pre_dispatch_computation
            node.submodule = partial(_share, node.submodule, between, reads, makes, arrives)
    last = plan.get_layer(len(decoder.layers) - 1)
    leave = partial(_leave, between, traffic)
    # A place for a node on the stream that computes, which layers of a decoder have no use for.
    if traffic is not None and (traffic.keeps or traffic.leaves):
        last.mtp_post_process = ScheduleNode(leave, get_comp_stream, plan.event, name="leave")
    else:
        last.mtp_post_process = _End(leave)


def sharing(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """``upstream``, ``GPTModel.build_schedule_plan``, whose plans share what crosses the layers of its decoder."""

    @wraps(upstream)
    def build_schedule_plan(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = upstream(self, *args, **kwargs)
        if hasattr(self.decoder, "route_plan"):
            share_between_nodes(plan, self.decoder)
        return plan

    return build_schedule_plan


#: Wrapped for the rest of the process when the first block of which plans can be made is built.
BUILD_SCHEDULE_PLAN = Wrapping(
    "megatron.core.models.gpt.gpt_model:GPTModel.build_schedule_plan",
    "a plan's nodes run without the block that opens a microbatch; plans of other models pass through",
    (
        "self",
        "input_ids",
        "position_ids",
        "attention_mask",
        "decoder_input",
        "labels",
        "inference_context",
        "packed_seq_params",
        "extra_block_kwargs",
        "runtime_gather_output",
        "inference_params",
        "loss_mask",
        "padding_mask",
        "output_processor",
        "output_processor_context",
    ),
    wrap=sharing,
)

_NODES = "called or given another function, to have tensors go from one node of a schedule to others"
SCHEDULE_NODES = (
    Reliance(f"{_UTILS}:TransformerLayerNode.forward_impl", _NODES, ("self", "args")),
    Reliance(f"{_UTILS}:PreProcessNode.forward_impl", "it leaves what arrived in the chunk's state", ("self",)),
    Reliance(f"{_PLAN}:TransformerModelChunkSchedulePlan.get_layer", _NODES, ("self", "i")),
    Reliance(
        f"{_PLAN}:TransformerLayerSchedulePlan.run",
        "its mtp_post_process, which comes last in a layer, packs what leaves a stage",
        ("f_layer", "b_layer", "f_input", "b_grad", "is_last_layer_in_bwd"),
    ),
    Reliance(
        "megatron.core.pipeline_parallel.utils:NoopScheduleNode.forward",
        "overridden by what follows the last layer where nothing goes on but hidden states",
        ("self", "inputs"),
    ),
)


def install_sharing_in_plans() -> None:
    """Have plans share what crosses layers.  Raises ``SeamError`` if upstream changed."""
    for reliance in SCHEDULE_NODES:
        reliance.require()
    wrap_once([BUILD_SCHEDULE_PLAN])
