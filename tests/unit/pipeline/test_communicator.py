"""The shapes a rank sends and receives, in order, and what happens when a tensor does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.payload import MicrobatchShape
from sla_megatron.pipeline.schedule import Schedule

from ..strategies import SLAPlan

SHAPE = MicrobatchShape(8, 2, 12)

#: 8 layers of 4 groups, 3 of which read six layers back.
SLA = SLAConfig(8, 4, (6,), 3)

CASES = [
    (2, [4, 4], Schedule(2, 1, 5)),
    (4, [1, 3, 3, 1], Schedule(4, 1, 3)),
    (2, [2] * 4, Schedule(2, 2, 4)),
    (2, [1, 3, 0, 4], Schedule(2, 2, 7, 4)),
    (4, [1] * 8, Schedule(4, 2, 8)),
    (4, [1] * 8, Schedule(4, 2, 8, forward_only=True)),
]


@pytest.fixture
def communicator(megatron_imported: None) -> ModuleType:
    """The module, once Megatron can be imported."""
    from sla_megatron.pipeline import communicator

    return communicator


@pytest.fixture
def alone(megatron: None) -> Iterator[Any]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(("pipeline_size", "sizes", "schedule"), CASES)
def test_each_receives_what_its_neighbour_sends(
    communicator: ModuleType, pipeline_size: int, sizes: list[int], schedule: Schedule
) -> None:
    """Shape for shape, in order, both ways; the total is every hop once a microbatch."""
    plan = SLAPlan(SLA, PipelineLayout.of_sizes(pipeline_size, sizes)).plan
    orders = [communicator.PayloadOrder.of(plan, schedule, SHAPE, rank, 0) for rank in range(pipeline_size)]
    for rank, order in enumerate(orders):
        following = orders[(rank + 1) % pipeline_size]
        assert order.forward_sent == following.forward_received
        assert following.backward_sent == order.backward_received
    hops = [SHAPE.payload_shape(plan.hop_columns(hop)) for hop in range(len(sizes) - 1)]
    sent = [shape for order in orders for shape in order.forward_sent]
    assert sorted(sent) == sorted(hops * schedule.num_microbatches)
    returned = [shape for order in orders for shape in order.backward_sent]
    assert sorted(returned) == ([] if schedule.forward_only else sorted(sent))
    assert max(hops) > SHAPE.hidden_shape, "K/V cross"


def test_shapes_are_answered_without_a_message(communicator: ModuleType, alone: Any) -> None:
    """Each direction has its own order; upstream's answer where nothing is received."""
    order = communicator.PayloadOrder([(8, 2, 12)], [(8, 2, 18), (8, 2, 12)], [(8, 2, 18)], [(8, 2, 24)])
    config = SimpleNamespace(virtual_pipeline_model_parallel_size=None, variable_seq_lengths=False)
    ours = communicator.SLAP2PCommunicator(alone, config, order)
    assert not config.variable_seq_lengths, "the model's own configuration is left alone"
    assert ours._communicate_shapes(None, None, True, False) == ([8, 2, 18], [0, 0, 0])
    assert ours._communicate_shapes(torch.empty(8, 2, 12), torch.empty(8, 2, 18), True, True) == (
        [8, 2, 12],
        [8, 2, 24],
    )
    ours.require_exhausted()


def test_a_tensor_that_does_not_fit_raises_before_it_is_sent(communicator: ModuleType, alone: Any) -> None:
    """With its shape and the receiver's, in either direction."""
    order = communicator.PayloadOrder([(8, 2, 12)], [], [(8, 2, 18)], [])
    config = SimpleNamespace(virtual_pipeline_model_parallel_size=None)
    ours = communicator.SLAP2PCommunicator(alone, config, order)
    with pytest.raises(RuntimeError, match=r"shape \(7, 2, 12\) \(forward_sent\).*expects \(8, 2, 12\)"):
        ours._communicate_shapes(torch.empty(7, 2, 12), None, False, False)
    with pytest.raises(RuntimeError, match=r"shape \(8, 2, 12\) \(backward_sent\).*expects \(8, 2, 18\)"):
        ours._communicate_shapes(None, torch.empty(8, 2, 12), False, False)


def test_too_many_or_too_few_raise(communicator: ModuleType, alone: Any) -> None:
    """A schedule that runs on, or stops early."""
    config = SimpleNamespace(virtual_pipeline_model_parallel_size=None)
    ours = communicator.SLAP2PCommunicator(alone, config, communicator.PayloadOrder([], [], [], []))
    with pytest.raises(RuntimeError, match="no tensor left .forward_received"):
        ours._communicate_shapes(None, None, True, False)
    early = communicator.SLAP2PCommunicator(alone, config, communicator.PayloadOrder([(1, 1, 1)], [], [], []))
    with pytest.raises(RuntimeError, match="tensors left: {'forward_sent': 1"):
        early.require_exhausted()


def test_a_schedule_table_of_another_order_raises(megatron_imported: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should upstream run its passes otherwise, that is found before anything is sent."""
    from sla_megatron.pipeline import transport
    from sla_megatron.upstream.seams import SeamError

    plan = SLAPlan(SLA, PipelineLayout.of_sizes(2, [2] * 4)).plan
    table = Schedule(2, 2, 6).table()
    monkeypatch.setattr(transport.schedules, "get_schedule_table", lambda *_: table[::-1])
    with pytest.raises(SeamError, match="schedule table"):
        transport._payload_order(plan, Schedule(2, 2, 6), SHAPE, 0, 0)


def test_a_stage_outside_of_a_schedule_raises(megatron_imported: None) -> None:
    """K/V of other stages exist within a schedule only."""
    from sla_megatron.pipeline.step import current_step

    with pytest.raises(RuntimeError, match="outside of Megatron's schedules"):
        current_step()
