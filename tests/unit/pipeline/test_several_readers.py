"""Tensors with several readers, in a pipeline that runs in one process: every rank's own code, and nothing between them
but payloads.  Hops, sizes and what waits are those of the specification; gradients those of one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import Context, copy_context
from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sla_megatron.pipeline.declarations import CrossLayerTensor, Declarations
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.payload import MicrobatchShape
from sla_megatron.pipeline.residency import residency
from sla_megatron.pipeline.routes import RoutePlan
from sla_megatron.pipeline.schedule import Schedule
from sla_megatron.pipeline.waiting import hand_over, microbatch, receive

from ..strategies import layouts, schedules

#: Of one of two tensor-parallel ranks, between which sequence parallelism splits hidden states.
SHAPE = MicrobatchShape(8, 1, 3, tensor_parallel_size=2, sequence_parallel=True)
POSITIONS, HIDDEN_POSITIONS = 8, 4


@st.composite
def plans(draw: st.DrawFn) -> RoutePlan:
    """Up to four tensors, read by up to all later layers, in any layout; some ranks have nothing of some."""
    num_layers = draw(st.integers(2, 12))
    tensors = []
    for i in range(draw(st.integers(1, 4))):
        source = draw(st.integers(1, num_layers - 1))
        readers = draw(st.sets(st.integers(source + 1, num_layers), min_size=1))
        sizes = draw(st.lists(st.integers(0, 2), min_size=2, max_size=2)), draw(st.integers(1, 3))
        tensors.append(
            CrossLayerTensor(
                f"t{i}",
                source,
                tuple(sorted(readers)),
                tuple(sizes[0]),
                sizes[1],
                draw(st.booleans()),
                draw(st.booleans()),
            )
        )
    return RoutePlan(Declarations(num_layers, tuple(tensors)), draw(layouts(num_layers)))


# Section 3 of the specification, one tensor and one stage at a time; nothing of the route plan.


@dataclass(frozen=True)
class Way:
    """How one tensor goes: which hops it crosses, and between which stages of a rank it waits there."""

    hops: tuple[int, ...]
    waits: tuple[tuple[int, int], ...]


def way(layout: PipelineLayout, tensor: CrossLayerTensor) -> Way:
    """Hop after hop, until each reader's rank was passed; on each of these it waits for the rank's last reader."""
    size = layout.pipeline_size

    def stage_of(layer: int) -> int:
        (found,) = [stage for stage, layers in enumerate(layout.stages) if layer in layers]
        return found

    stage = source = stage_of(tensor.source)
    missing = {stage_of(reader) for reader in tensor.readers} - {source}
    hops, waits = [], []
    while missing:
        here = {reader for reader in missing if reader % size == stage % size}
        if here and max(here) > stage:
            waits.append((stage, max(here)))
        missing -= here
        if missing:
            hops.append(stage)
            stage += 1
    return Way(tuple(hops), tuple(waits))


def elements(tensor: CrossLayerTensor, rank: int) -> int:
    positions = HIDDEN_POSITIONS if tensor.follows_hidden else POSITIONS
    return positions * tensor.widths[rank] * tensor.unit


def hop_elements(plan: RoutePlan, hop: int, rank: int) -> int:
    """The lower bound: hidden states, and once each tensor that crosses the hop."""
    crossing = [tensor for tensor in plan.declared.tensors if hop in way(plan.layout, tensor).hops]
    return HIDDEN_POSITIONS * 3 + sum(elements(tensor, rank) for tensor in crossing)


def most_waiting(plan: RoutePlan, schedule: Schedule, rank: int, tensor_rank: int) -> int:
    """The most elements that wait on ``rank`` after a pass; in the end none may be left."""
    held: dict[tuple[str, Any, int], int] = {}
    most = 0
    for kind, chunk, batch in schedule.passes(rank):
        stage = chunk * schedule.pipeline_size + rank
        for tensor in plan.declared.tensors:
            for kept, last in way(plan.layout, tensor).waits:
                gone, come = (last, kept) if kind == "F" else (kept, last)
                if stage == gone:
                    del held[kind, tensor.name, batch]
                if stage == come:
                    held[kind, tensor.name, batch] = elements(tensor, tensor_rank)
        most = max(most, sum(held.values()))
    assert not held
    return most


@given(plans())
@settings(max_examples=120)
def test_each_tensor_goes_as_the_specification_says(plan: RoutePlan) -> None:
    ways = {tensor.name: way(plan.layout, tensor) for tensor in plan.declared.tensors}
    found = {route.tensor.name: route for route in plan.routes}
    assert found.keys() == {name for name, its in ways.items() if its.hops or its.waits}
    for name, route in found.items():
        assert tuple(route.hops) == ways[name].hops
        assert sorted((stage, readers[-1]) for stage, readers in route.resident.items()) == sorted(ways[name].waits)
    for hop in range(-1, plan.layout.num_stages):
        for rank in (0, 1):
            assert SHAPE.payload_elements(plan.hop_columns(hop, rank)) == hop_elements(plan, hop, rank)


@given(plans(), st.data())
@settings(max_examples=120)
def test_what_waits_is_the_specification_s(plan: RoutePlan, data: st.DataObject) -> None:
    schedule = data.draw(schedules(plan.layout.pipeline_size, plan.layout.num_chunks), label="schedule")
    for rank in range(schedule.pipeline_size):
        for tensor_rank in (0, 1):
            found = residency(plan, schedule, SHAPE, rank, tensor_rank)
            assert found.resident == most_waiting(plan, schedule, rank, tensor_rank)


def enough(size: int, source: int, readers: tuple[int, ...], chosen: set[int]) -> bool:
    """Whether a tensor of stage ``source`` is on each reader's rank in time if it crosses the hops ``chosen``."""
    holding = {source % size}
    for stage in range(source + 1, max(readers) + 1):
        if stage - 1 in chosen and (stage - 1) % size in holding:
            holding.add(stage % size)
        if stage in readers and stage % size not in holding:
            return False
    return True


@pytest.mark.parametrize(("size", "chunks"), [(1, 4), (2, 2), (2, 3), (3, 2), (5, 1)])
def test_no_fewer_hops_would_do(size: int, chunks: int) -> None:
    """By trying every set of hops, for every source and every set of readers."""
    num_stages = size * chunks
    layout = PipelineLayout.of_sizes(size, [1] * num_stages)
    for source in range(num_stages - 1):
        later = range(source + 1, num_stages)
        for readers in (some for count in (1, 2, 3) for some in combinations(later, count)):
            layers = tuple(reader + 1 for reader in readers)
            declared = Declarations(num_stages, (CrossLayerTensor("t", source + 1, layers, (1,), 1),))
            crossed = [hop for hop in range(num_stages) if RoutePlan(declared, layout).hop(hop)]
            assert enough(size, source, readers, set(crossed))
            fewer = combinations(range(num_stages - 1), len(crossed) - 1) if crossed else ()
            assert not any(enough(size, source, readers, set(chosen)) for chosen in fewer)


# The pipeline in one process.


class Layer(torch.nn.Module):
    """Adds what it reads of others to hidden states ``[s, b, h]``; each element that is read has its own factor."""

    def __init__(self, number: int, declared: Declarations, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)

        def parameter(tensor: CrossLayerTensor) -> torch.nn.Parameter:
            shape = SHAPE.tensor_shape(tensor, rank)
            return torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.layer_number = number
        self.reads = {one.name: parameter(one) for one in declared.read_by(number)}
        self.makes = {one.name: parameter(one) for one in declared.made_by(number)}
        self.weights = [*self.reads.values(), *self.makes.values()]

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        for name, factors in self.reads.items():
            hidden_states = hidden_states + (receive(name) * factors).mean().sin()
        hidden_states = hidden_states.sin() * self.layer_number**0.5
        for i, (name, weights) in enumerate(self.makes.items()):
            whole = weights * hidden_states.mean()
            if i % 2:
                hand_over(name, whole)
            else:
                # A view of something larger, of which others hold parts too.
                hand_over(name, torch.cat([whole, whole], dim=3)[..., : whole.shape[3]])
        return hidden_states, None


class Stage(torch.nn.Module):
    """What an upstream block does: run its layers, recomputed or not."""

    def forward(self, hidden_states: Tensor | None) -> Tensor:
        hidden_states = hidden_states if self.pre_process else self.input_tensor
        if self.config.recompute_granularity == "full":
            from sla_megatron.model.recomputation import checkpointed_forward

            return checkpointed_forward(self, hidden_states, None, None, None, None, None, None, False)
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states)
        # As upstream's of a stage without layers: never its input itself.
        return hidden_states if len(self.layers) else hidden_states.clone()


#: ``--recompute-method`` and ``--recompute-num-layers``.
Recomputation = tuple[str, int]


def blocks(plan: RoutePlan, rank: int, recompute: Recomputation | None) -> list[Any]:
    """Each stage's block, with our own forward before upstream's."""
    from sla_megatron.model.crossing import CrossLayerBlock

    class Block(CrossLayerBlock, Stage):
        pass

    found = []
    for number, layers in enumerate(plan.layout.stages):
        block = Block()
        block.declared, block.route_plan = plan.declared.on_rank(rank), plan
        block.traffic = plan.traffic(number, rank)
        block.uses, block.pre_process, block.input_tensor = block.traffic.uses, number == 0, None
        block.layers = torch.nn.ModuleList(Layer(layer, block.declared, rank) for layer in layers)
        block.pg_collection = SimpleNamespace(tp=None)
        block.config = SimpleNamespace(
            recompute_granularity="full" if recompute else None,
            recompute_method=recompute and recompute[0],
            recompute_num_layers=recompute and recompute[1],
            distribute_saved_activations=False,
            fp8=None,
            fp4=None,
        )
        found.append(block)
    return found


class Rank:
    """One pipeline rank: its step, open in a context of its own, and how much waits in it at most."""

    def __init__(self, number: int, schedule: Schedule) -> None:
        from sla_megatron.pipeline.step import PipelineStep, pipeline_step

        self.step = PipelineStep(SHAPE, schedule.forward_only)
        self.passes = list(schedule.passes(number))
        self.most = 0
        self._context: Context = copy_context()
        self._opened = pipeline_step(self.step)
        self._context.run(self._opened.__enter__)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        result = self._context.run(function, *args)
        waiting = self.step.resident.tensors()
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in waiting), "nothing larger stays"
        self.most = max(self.most, sum(tensor.numel() for tensor in waiting))
        return result

    def close(self, error: BaseException | None = None) -> None:
        """Raises where something is left, unless a pass raised ``error`` before."""
        self._context.run(self._opened.__exit__, error and type(error), error, error and error.__traceback__)
        assert error or not self.step.resident.tensors()


def inputs(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + batch)
    return torch.randn(HIDDEN_POSITIONS, 1, 3, generator=generator, dtype=torch.float64).requires_grad_()


def loss_of(output: Tensor) -> Tensor:
    return output.pow(2).sum()


class Pipeline:
    """All ranks of a pipeline, for one tensor-parallel rank, by the schedule's order on each."""

    def __init__(self, plan: RoutePlan, schedule: Schedule, rank: int, recompute: Recomputation | None) -> None:
        self.plan, self.last = plan, plan.layout.num_stages - 1
        self.blocks = blocks(plan, rank, recompute)
        self.ranks = [Rank(number, schedule) for number in range(schedule.pipeline_size)]
        self.starts = {batch: inputs(batch) for batch in range(schedule.num_microbatches)}
        self.given: dict[tuple[int, int], Tensor | None] = {(0, batch): None for batch in self.starts}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.losses: dict[int, Tensor] = {}
        self.sizes: dict[tuple[str, int], set[int]] = {}
        self.back: dict[tuple[int, int], Tensor] = {}

    def run(self) -> None:
        """Every pass; then nothing may be left."""
        try:
            self._run()
        except BaseException as error:
            for rank in self.ranks:
                rank.close(error)
            raise
        for rank in self.ranks:
            rank.close()

    def _run(self) -> None:
        """Pass after pass, each as soon as what it needs is there."""
        while any(rank.passes for rank in self.ranks):
            ready = [(number, rank) for number, rank in enumerate(self.ranks) if rank.passes and self._is_ready(number)]
            assert ready, "ranks wait for each other"
            for number, rank in ready:
                kind, chunk, batch = rank.passes.pop(0)
                rank.run(self._forward if kind == "F" else self._backward, self.plan.layout.stage(number, chunk), batch)

    def _is_ready(self, number: int) -> bool:
        kind, chunk, batch = self.ranks[number].passes[0]
        stage = self.plan.layout.stage(number, chunk)
        return (stage, batch) in (self.given if kind == "F" else self.back) or (kind == "B" and stage == self.last)

    def _forward(self, stage: int, batch: int) -> None:
        block, payload = self.blocks[stage], self.given[stage, batch]
        block.input_tensor = payload
        output = block(self.starts[batch] if stage == 0 else None)
        self.outputs[stage, batch] = output
        if stage == self.last:
            self.losses[batch] = loss_of(output)
        else:
            self.sizes.setdefault(("F", stage), set()).add(output.numel())
            self.given[stage + 1, batch] = output.detach().clone().requires_grad_()

    def _backward(self, stage: int, batch: int) -> None:
        output = self.outputs.pop((stage, batch))
        if stage == self.last:
            self.losses[batch].backward()
        else:
            output.backward(self.back.pop((stage, batch)))
        if stage:
            gradient = self.given.pop((stage, batch)).grad
            self.sizes.setdefault(("B", stage - 1), set()).add(gradient.numel())
            self.back[stage - 1, batch] = gradient

    def found(self) -> Iterator[Tensor]:
        """Losses, and the gradients of inputs and of weights in order of the layers."""
        for batch, start in self.starts.items():
            yield from (self.losses[batch].detach(), start.grad)
        for block in self.blocks:
            for layer in block.layers:
                yield from (weight.grad for weight in layer.weights)


def one_graph(plan: RoutePlan, schedule: Schedule, rank: int) -> list[Tensor]:
    """The same of a model without a pipeline."""
    declared = plan.declared.on_rank(rank)
    layers = [Layer(number, declared, rank) for number in range(1, declared.num_layers + 1)]
    found = []
    for batch in range(schedule.num_microbatches):
        hidden_states = start = inputs(batch)
        with microbatch(declared.reads_within(range(1, declared.num_layers + 1))):
            for layer in layers:
                hidden_states, _ = layer(hidden_states)
        loss = loss_of(hidden_states)
        loss.backward()
        found += [loss.detach(), start.grad]
    return found + [weight.grad for layer in layers for weight in layer.weights]


@given(
    plans(),
    st.none() | st.tuples(st.sampled_from(["uniform", "block"]), st.integers(1, 3)),
    st.sampled_from([0, 1]),
    st.data(),
)
@settings(max_examples=40)
def test_a_pipeline_has_the_gradients_of_one_graph(
    one_rank: None, plan: RoutePlan, recompute: Recomputation | None, rank: int, data: st.DataObject
) -> None:
    """And what crosses each hop both ways, and waits on each rank, is the bound; twice the same to the last bit."""
    drawn = schedules(plan.layout.pipeline_size, plan.layout.num_chunks).filter(lambda one: not one.forward_only)
    schedule = data.draw(drawn, label="schedule")
    runs = [Pipeline(plan, schedule, rank, recompute) for _ in range(2)]
    for run in runs:
        run.run()
        for (_, hop), sizes in run.sizes.items():
            assert sizes == {hop_elements(plan, hop, rank)}
        for number, one in enumerate(run.ranks):
            assert one.most == most_waiting(plan, schedule, number, rank)
    for found, again, expected in zip(*(run.found() for run in runs), one_graph(plan, schedule, rank), strict=True):
        torch.testing.assert_close(found, expected)
        assert torch.equal(found, again)
