"""Skip-layer K/V where Megatron runs a block's layers as nodes of a schedule (``--overlap-moe-expert-parallel-comm``).

There the forward pass of one microbatch is interleaved with the backward pass of another, a piece of a layer at a
time, and a block's ``forward`` is not called.  Each microbatch has a plan of its own, made by
``GPTModel.build_schedule_plan``; its K/V live and die with it.

Each node has an autograd graph of its own: it starts from detached inputs, and its backward pass is run by itself, in
the reverse order.  K/V that go from one node to another therefore wait as those that are resident between two stages
do (``pipeline/resident_kv.py``): the reader's backward pass deposits their gradients, the other's collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

import torch
from megatron.core.pipeline_parallel.utils import ScheduleNode, get_comm_stream, get_comp_stream
from torch import Tensor

from ..attention.microbatch_kv import Bundle, MicrobatchKV, microbatch
from ..attention.roles import BundleName, LayerRole
from ..attention.self_attention import SLASelfAttention
from ..pipeline.resident_kv import ResidentKV
from ..pipeline.routes import StageTraffic
from ..pipeline.step import current_step
from ..upstream.seams import Reliance, Wrapping, wrap_once

_UTILS = "megatron.core.models.common.utils"
_PLAN = "megatron.core.models.common.model_chunk_schedule_plan"


class _BetweenNodes:
    """The K/V of one microbatch that wait, in one block, for a later node of its plan, and then their gradients."""

    def __init__(self) -> None:
        self._resident = ResidentKV()
        #: How many pieces the keys of a bundle have, and the values.
        self._pieces: dict[BundleName, tuple[int, int]] = {}

    def keep(self, kv: MicrobatchKV, names: Iterable[BundleName], output: Tensor) -> Tensor:
        """Take ``names`` from ``kv``, for later nodes.  What it returns is to be the node's in place of ``output``."""
        for name in names:
            bundle = kv.take(name)
            self._pieces[name] = len(bundle.keys), len(bundle.values)
            output = self._resident.keep(name, 0, (*bundle.keys, *bundle.values), output)
        return output

    def fetch(self, kv: MicrobatchKV, names: Iterable[BundleName], node_input: Tensor) -> None:
        """Put ``names`` into ``kv``; ``node_input`` is any input of the node that reads them."""
        for name in names:
            keys, _ = self._pieces.pop(name, (0, 0))
            pieces = self._resident.fetch(name, 0, node_input)
            kv.put(name, Bundle(pieces[:keys], pieces[keys:]))

    def require_read(self) -> None:
        """Raise ``RuntimeError`` where K/V found no reader."""
        self._resident.require_released(forward_only=True)


def _attend(
    upstream: Callable[..., Any],
    between: _BetweenNodes,
    role: LayerRole,
    traffic: StageTraffic | None,
    node: Any,
    hidden_states: Tensor,
) -> tuple[Tensor, ...] | Tensor:
    """The node with a layer's attention; with ``traffic`` the first of a stage, which is given a payload."""
    with microbatch() as kv:
        if traffic is not None:
            hidden_states = _arrive(between, kv, traffic, node.chunk_state, hidden_states)
        between.fetch(kv, role.takes, hidden_states)
        outputs = upstream(node, hidden_states)
        if isinstance(outputs, tuple):
            return between.keep(kv, role.puts, outputs[0]), *outputs[1:]
        return between.keep(kv, role.puts, outputs)


def _arrive(
    between: _BetweenNodes, kv: MicrobatchKV, traffic: StageTraffic, chunk_state: Any, payload: Tensor
) -> Tensor:
    received = chunk_state.decoder_input
    # It may have been received on the stream that communicates, and is about to be freed.
    payload.record_stream(torch.cuda.current_stream())
    # Their graphs hold on to what arrived until their own backward pass, not until that of the whole stage.
    hidden_states = current_step().enter(traffic, kv, payload, keeps_reads=True)
    # What the node was given is another tensor on the same memory; the schedule keeps the one that was received.
    received.data = payload.data
    return between.keep(kv, (*traffic.arrives, *traffic.fetches), hidden_states)


def _leave(between: _BetweenNodes, traffic: StageTraffic | None, hidden_states: Tensor) -> Tensor:
    """What follows a block's last layer."""
    with microbatch() as kv:
        if traffic is not None:
            between.fetch(kv, (*traffic.keeps, *traffic.leaves), hidden_states)
            hidden_states = current_step().leave(traffic, kv, hidden_states)
            # From there it is sent, and freed.
            hidden_states.record_stream(get_comm_stream())
        between.require_read()
        return hidden_states


def share_kv(plan: Any, decoder: Any) -> None:
    """Have the nodes of ``plan``, one microbatch's in the block ``decoder``, share K/V.

    Raises ``RuntimeError`` for a stage that relays K/V without a layer: between its nodes there is no place for it.
    """
    traffic = None if decoder.traffic is None or decoder.traffic.is_none else decoder.traffic
    if not decoder.layers:
        if traffic is not None:
            raise RuntimeError("a pipeline stage without a layer cannot pass skip-layer K/V on as a schedule's nodes")
        return
    between = _BetweenNodes()
    for index, layer in enumerate(decoder.layers):
        if isinstance(layer.self_attention, SLASelfAttention):
            node = plan.get_layer(index).pre_dispatch_computation
            arrives = traffic if traffic is not None and traffic.stage > 0 and index == 0 else None
            node.submodule = partial(_attend, node.submodule, between, layer.self_attention.role, arrives)
    last = plan.get_layer(len(decoder.layers) - 1)
    # A place for a node on the stream that computes, which layers of a decoder have no use for.
    last.mtp_post_process = ScheduleNode(partial(_leave, between, traffic), get_comp_stream, plan.event, name="leave")


def sharing_kv(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """``upstream``, ``GPTModel.build_schedule_plan``, whose plans share K/V where the model is a skip-layer one."""

    @wraps(upstream)
    def build_schedule_plan(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = upstream(self, *args, **kwargs)
        if hasattr(self.decoder, "route_plan"):
            share_kv(plan, self.decoder)
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
    wrap=sharing_kv,
)

_NODES = "called or given another function, to have K/V go from one node of a schedule to another"
SCHEDULE_NODES = (
    Reliance(f"{_UTILS}:TransformerLayerNode.forward_impl", _NODES, ("self", "args")),
    Reliance(f"{_UTILS}:PreProcessNode.forward_impl", "it leaves what arrived in the chunk's state", ("self",)),
    Reliance(f"{_PLAN}:TransformerModelChunkSchedulePlan.get_layer", _NODES, ("self", "i")),
    Reliance(
        f"{_PLAN}:TransformerLayerSchedulePlan.run",
        "its mtp_post_process, which comes last in a layer, packs what leaves a stage",
        ("f_layer", "b_layer", "f_input", "b_grad", "is_last_layer_in_bwd"),
    ),
)


def install_sharing_in_plans() -> None:
    """Have plans share K/V.  Raises ``SeamError`` if upstream changed."""
    for reliance in SCHEDULE_NODES:
        reliance.require()
    wrap_once([BUILD_SCHEDULE_PLAN])
