"""The route plan against a brute force that moves every key and value on its own, and against the spec's formula."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sla_megatron.attention.roles import SharedTensor
from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.pipeline.declarations import CrossLayerTensor
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.routes import StageTraffic

from ..strategies import KV, SLAPlan, readers_of, route_plans

# The brute force: layers, groups and stages one by one, and nothing of the route plan.


def stage_holding(layout: PipelineLayout, layer: int) -> int:
    """The stage of ``layer``, found by looking into every one."""
    (stage,) = [stage for stage, layers in enumerate(layout.stages) if layer in layers]
    return stage


def travels(plan: SLAPlan, groups: range) -> dict[KV, tuple[int, set[int]]]:
    """K/V of ``groups`` that other stages read -> the stage of the source and the other stages that read it."""
    found = {}
    for layer in range(1, plan.sla.num_layers + 1):
        for kv in ((kind, layer, group) for kind in ("key", "value") for group in groups):
            source = stage_holding(plan.layout, layer)
            others = {stage_holding(plan.layout, later) for later in readers_of(plan.sla, kv)} - {source}
            if others:
                found[kv] = (source, others)
    return found


def formula(plan: SLAPlan, groups: range) -> tuple[dict[KV, list[int]], dict[tuple[KV, int], set[int]]]:
    """Section 3 of the spec: the hops that each K/V crosses; the stages in which it becomes resident -> for which."""
    size = plan.layout.pipeline_size
    hops, resident = {}, {}
    for kv, (source, targets) in travels(plan, groups).items():
        hops[kv] = [source + i for i in range(max((target - source) % size for target in targets))]
        for target in targets:
            arrival = source + (target - source) % size
            if arrival != target:
                resident.setdefault((kv, arrival), set()).add(target)
    return hops, resident


def every_group(plan: SLAPlan) -> range:
    """The groups of all tensor-parallel ranks."""
    return range(plan.sla.num_query_groups)


def labels(plan: SLAPlan, groups: range, tensors: tuple[CrossLayerTensor, ...]) -> set[KV]:
    """What tensors are made of on the tensor-parallel rank that holds ``groups``."""
    made_of = [kv for tensor in tensors for kv in plan.made_of(tensor.name) if kv[2] in groups]
    assert len(made_of) == len(set(made_of))
    return set(made_of)


class Ring:
    """The pipeline ranks of one tensor-parallel rank: what each holds, and what is under way to the next stage."""

    def __init__(self, plan: SLAPlan, tensor_parallel_rank: int) -> None:
        self.plan, self.tensor_parallel_rank = plan, tensor_parallel_rank
        self.groups = plan.sla.rank_groups(plan.tensor_parallel_size, tensor_parallel_rank)
        size = plan.layout.pipeline_size
        self.resident: list[set[tuple[KV, int]]] = [set() for _ in range(size)]
        self.seen: list[set[tuple[KV, int]]] = [set() for _ in range(size)]
        self.under_way: dict[tuple[int, int], set[KV]] = {}

    def run(self, stage: int, microbatch: int) -> None:
        """One stage's forward of one microbatch, as its rank runs it."""
        rank = stage % self.plan.layout.pipeline_size
        resident, seen = self.resident[rank], self.seen[rank]
        traffic = self.plan.traffic(stage, self.tensor_parallel_rank)
        arrives, leaves, keeps, fetches = (
            labels(self.plan, self.groups, names)
            for names in (traffic.arrives, traffic.leaves, traffic.keeps, traffic.fetches)
        )
        assert traffic.stage == stage
        assert arrives == self.under_way.pop((stage, microbatch), set())
        # Nothing that this rank holds, or has held, of this microbatch.
        assert not {(kv, microbatch) for kv in arrives} & seen
        seen |= {(kv, microbatch) for kv in arrives}
        assert {(kv, microbatch) for kv in fetches} <= resident
        # It waits until the last of this rank's stages that read it.
        resident -= {(kv, microbatch) for kv in fetches if self._last_reader(kv, rank) == stage}

        here, read = arrives | fetches, set()
        for layer in self.plan.layout.stages[stage]:
            own = {(kind, layer, group) for kind in ("key", "value") for group in self.groups}
            here |= own
            seen |= {(kv, microbatch) for kv in own}
            read |= {(kind, self.plan.sla.source_of(layer, group, kind), group) for kind, _, group in own}
            assert read <= here
        # What came is read here, goes on or stays; what goes on or stays is for a later stage.
        assert fetches <= read
        assert arrives <= read | leaves | keeps
        assert leaves | keeps <= here
        last_layer = max((layer for layers in self.plan.layout.stages[: stage + 1] for layer in layers), default=0)
        assert all(readers_of(self.plan.sla, kv)[-1] > last_layer for kv in leaves | keeps)
        self._counts(traffic)
        if leaves:
            self.under_way[stage + 1, microbatch] = leaves
        resident |= {(kv, microbatch) for kv in keeps}

    def _stages_reading(self, kv: KV) -> list[int]:
        """Ascending, and as often as there are layers that do."""
        return [stage_holding(self.plan.layout, layer) for layer in readers_of(self.plan.sla, kv)]

    def _last_reader(self, kv: KV, rank: int) -> int:
        return max(stage for stage in self._stages_reading(kv) if stage % self.plan.layout.pipeline_size == rank)

    def _counts(self, traffic: StageTraffic) -> None:
        """How often each tensor is taken in the stage and, once it is resident, in later ones."""
        rank, size = traffic.stage % self.plan.layout.pipeline_size, self.plan.layout.pipeline_size
        for tensor in self.plan.plan.declared.on_rank(self.tensor_parallel_rank).tensors:
            stages = self._stages_reading(self.plan.made_of(tensor.name)[0])
            assert traffic.reads[tensor.name] == stages.count(traffic.stage)
            later = {stage for stage in stages if stage > traffic.stage and stage % size == rank}
            assert traffic.readers.get(tensor.name, 0) == (len(later) if tensor in traffic.keeps else 0)


@given(route_plans(), st.integers(1, 3))
@settings(max_examples=200)
def test_every_read_finds_its_kv(plan: SLAPlan, microbatches: int) -> None:
    """Played through on a ring of ranks: all is there when it is read, nothing comes in vain, nothing is left."""
    order = [(stage, m) for stage in range(plan.layout.num_stages) for m in range(microbatches)]
    for rank in range(plan.tensor_parallel_size):
        ring = Ring(plan, rank)
        for stage, microbatch in sorted(order, key=sum):
            ring.run(stage, microbatch)
        assert not ring.under_way
        assert not any(ring.resident)


@given(route_plans())
@settings(max_examples=200)
def test_the_hops_are_the_spec_s(plan: SLAPlan) -> None:
    """Each K/V crosses the hops to its furthest reader's rank, once each, and no others; their total agrees."""
    hops, resident = formula(plan, every_group(plan))
    crossing = {hop: plan.crossing(hop) for hop in range(-1, plan.layout.num_stages + 1)}
    for hop, crossed in crossing.items():
        assert len(crossed) == len(set(crossed))
        assert set(crossed) == {kv for kv, its in hops.items() if hop in its}
    assert sum(map(len, crossing.values())) == sum(map(len, hops.values()))
    kept = {
        (kv, stage): set(readers)
        for route in plan.routes
        for stage, readers in route.resident.items()
        for kv in plan.made_of(route.tensor.name)
    }
    assert kept == resident
    assert plan.moves_nothing == (not travels(plan, every_group(plan)))


@given(route_plans())
def test_without_interleaving_every_hop_between(plan: SLAPlan) -> None:
    """One stage a rank: K/V cross all hops from their source to their last reader, and nothing is ever resident."""
    plan = SLAPlan(plan.sla, PipelineLayout(plan.layout.num_stages, plan.layout.stages), plan.tensor_parallel_size)
    between = travels(plan, every_group(plan))
    for hop in range(plan.layout.num_stages):
        assert set(plan.crossing(hop)) == {kv for kv, (a, later) in between.items() if a <= hop < max(later)}
    assert not any(route.resident for route in plan.routes)


def fewest_hops(size: int, num_stages: int, source: int, target: int) -> int:
    """By trying every set of hops: the fewest that bring K/V of stage ``source`` to the rank of ``target`` in time."""
    hops = range(num_stages - 1)
    for count in range(num_stages):
        for chosen in combinations(hops, count):
            holding: set[int] = set()
            for stage in range(target + 1):
                if stage == source or (stage - 1 in chosen and (stage - 1) % size in holding):
                    holding.add(stage % size)
            if target % size in holding:
                return count
    raise AssertionError("the ring reaches every rank")


@pytest.mark.parametrize(
    ("size", "chunks"), [(1, 3), (2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (5, 1)]
)
def test_no_fewer_hops_would_do(size: int, chunks: int) -> None:
    """For every two stages: no smaller set of hops lets the reader's rank hold the K/V when it needs them."""
    num_stages = size * chunks
    layout = PipelineLayout.of_sizes(size, [1] * num_stages)
    for source, target in combinations(range(num_stages), 2):
        plan = SLAPlan(SLAConfig(num_stages, 1, (target - source,), 1, layers=(target + 1,)), layout)
        crossed = [hop for hop in range(num_stages) if plan.crossing(hop)]
        assert len(crossed) == fewest_hops(size, num_stages, source, target), (source, target)


@given(route_plans())
def test_tensor_parallel_ranks_together_move_the_model(plan: SLAPlan) -> None:
    """Each rank's bundles are its own groups of them; over the ranks they add up to the whole model's."""
    ranks = range(plan.tensor_parallel_size)
    for route in plan.routes:
        groups = [group for _, _, group in plan.made_of(route.tensor.name)]
        held = [plan.sla.rank_groups(plan.tensor_parallel_size, rank) for rank in ranks]
        assert route.tensor.widths == tuple(sum(group in its for group in groups) for its in held)
        assert sum(route.tensor.widths) == len(groups)
    for stage in range(plan.layout.num_stages):
        assert sum(plan.hop_width(stage, rank) for rank in ranks) == len(plan.crossing(stage))
        for rank in ranks:
            traffic = plan.traffic(stage, rank)
            assert (traffic.stage, traffic.tensor_parallel_rank) == (stage, rank)
            concerned = (*traffic.arrives, *traffic.leaves, *traffic.keeps, *traffic.fetches)
            assert all(tensor.widths[rank] for tensor in concerned)
            for tensors, hop in ((traffic.leaves, stage), (traffic.arrives, stage - 1)):
                assert sum(tensor.widths[rank] for tensor in tensors) == plan.hop_width(hop, rank)


@given(route_plans())
@settings(max_examples=200)
def test_both_ends_of_a_hop_have_the_same_order(plan: SLAPlan) -> None:
    """By source layer and readers, keys before values; what one stage sends is what the next expects, on every rank."""
    for hop in range(plan.layout.num_stages - 1):
        crossed = plan.crossing(hop)
        assert list(crossed) == sorted(crossed, key=lambda kv: (kv[1], readers_of(plan.sla, kv), kv[0], kv[2]))
        for rank in range(plan.tensor_parallel_size):
            leaves = plan.traffic(hop, rank).leaves
            assert leaves == plan.traffic(hop + 1, rank).arrives
            names = [tensor.name for tensor in leaves]
            assert names == sorted(set(names), key=lambda name: (name.source, name.readers, name.kind))
    for rank in range(plan.tensor_parallel_size):
        assert plan.traffic(0, rank).arrives == ()
        assert plan.traffic(plan.layout.num_stages - 1, rank).leaves == ()


@given(route_plans())
def test_traffic_is_none_where_nothing_concerns_a_stage(plan: SLAPlan) -> None:
    """No K/V of this tensor-parallel rank arrive, leave, stay or are fetched: the stage is a stock one."""
    for rank in range(plan.tensor_parallel_size):
        hops, resident = formula(plan, plan.sla.rank_groups(plan.tensor_parallel_size, rank))
        concerned = {stage for its in hops.values() for hop in its for stage in (hop, hop + 1)}
        concerned |= {stage for (_, kept), fetched in resident.items() for stage in (kept, *fetched)}
        for stage in range(plan.layout.num_stages):
            assert plan.traffic(stage, rank).is_none == (stage not in concerned)


_NAME = r"skip-layer (key|value)s of attention layer (\d+) for layers? ([\d,]+)"


def parse(plan: SLAPlan, text: str) -> dict[KV, tuple[int, ...]]:
    """``skip-layer keys of attention layer 3 for layers 7,9``, any number of these -> readers of each K/V."""
    found = {}
    for kind, layer, later in re.findall(_NAME, text):
        readers = tuple(map(int, later.split(",")))
        found |= dict.fromkeys(plan.made_of(SharedTensor(kind, int(layer), readers)), readers)
    return found


@given(route_plans())
def test_the_plan_in_words(plan: SLAPlan) -> None:
    """It says of every hop what crosses it, and of every resident tensor where and how long it is."""
    hops, resident = formula(plan, every_group(plan))
    size = plan.layout.pipeline_size
    lines = str(plan.plan).splitlines()
    said = [re.fullmatch(r"hop (\d+) \(rank (\d+) -> (\d+)\): (.*)", line) for line in lines]
    for hop, match in enumerate(match for match in said if match):
        assert [int(match[i]) for i in (1, 2, 3)] == [hop, hop % size, (hop + 1) % size]
        crossed = [kv for kv, its in hops.items() if hop in its]
        assert parse(plan, match[4]) == {kv: readers_of(plan.sla, kv) for kv in crossed}
        assert (match[4] == "none") == (not crossed)
    assert sum(match is not None for match in said) == plan.layout.num_stages - 1
    said_resident: dict[tuple[KV, int], set[int]] = {}
    for line in lines:
        match = re.fullmatch(rf"rank (\d+): ({_NAME}) resident from stage (\d+) to stages? ([\d, ]+)", line)
        if match:
            kept, stages = int(match[6]), set(map(int, match[7].split(",")))
            assert {stage % size for stage in (kept, *stages)} == {int(match[1])}
            for kv in parse(plan, match[2]):
                assert (kv, kept) not in said_resident
                said_resident[kv, kept] = stages
    assert said_resident == resident


@pytest.mark.parametrize("sizes", [[1] * 16, [0, 2] * 8], ids=["one-layer-a-stage", "two-layers-in-every-other"])
def test_a_distance_of_whole_rounds_crosses_no_hop(sizes: list[int]) -> None:
    """16 layers, P = 4, v = 4, distance 12: source and reader share a rank, which the K/V never leave."""
    plan = SLAPlan(SLAConfig(16, 4, (12,), 3), PipelineLayout.of_sizes(4, sizes))
    assert [plan.crossing(hop) for hop in range(15)] == [()] * 15
    assert "resident from stage 0 to stage 12" in str(plan.plan) or sizes[0] == 0
    assert not plan.moves_nothing
    assert [route.tensor.name for route in plan.routes] == [
        SharedTensor(kind, layer, (layer + 12,)) for layer in range(1, 5) for kind in ("key", "value")
    ]
    for route in plan.routes:
        assert route.num_hops == 0
        assert plan.traffic(route.source_stage).keeps == tuple(
            other.tensor for other in plan.plan.routes if other.source_stage == route.source_stage
        )
    assert [plan.traffic(stage).is_none for stage in (5, 6, 10)] == [True] * 3


def test_one_stage_moves_nothing() -> None:
    """All layers in one stage, or the distance within each stage: a stock pipeline."""
    assert SLAPlan(SLAConfig(6, 2, (2,), 2), PipelineLayout.of_sizes(1, [6])).moves_nothing
    within = SLAConfig(6, 2, (2,), 2, layers=(3, 6))
    assert SLAPlan(within, PipelineLayout.of_sizes(2, [3, 3])).moves_nothing
    assert not SLAPlan(within, PipelineLayout.of_sizes(2, [4, 2])).moves_nothing


def test_two_ranks_by_hand() -> None:
    """4 layers in stages 1 | 2 | 3 | 4 on 2 ranks, distances 2 and 3: what each of the four stages does."""
    plan = SLAPlan(SLAConfig(4, 4, (2, 3), 4), PipelineLayout.of_sizes(2, [1, 1, 1, 1]), tensor_parallel_size=2)
    # Distance 2 stays on its rank, distance 3 crosses one hop; each TP rank holds one of the two groups of either.
    stages = [plan.traffic(stage, 1) for stage in range(4)]

    def said(tensors: tuple[CrossLayerTensor, ...]) -> list[tuple[int, int, int]]:
        assert [tensor.name.kind for tensor in tensors] == ["key", "value"] * (len(tensors) // 2)
        return [(tensor.source, *tensor.readers, tensor.widths[1]) for tensor in tensors[::2]]

    assert [said(t.keeps) for t in stages] == [[(1, 3, 1)], [(1, 4, 1), (2, 4, 1)], [], []]
    assert [said(t.fetches) for t in stages] == [[], [], [(1, 3, 1)], [(1, 4, 1), (2, 4, 1)]]
    assert [said(t.arrives) for t in stages] == [[], [(1, 4, 1)], [], []]
    assert [said(t.leaves) for t in stages] == [[(1, 4, 1)], [], [], []]
    assert plan.crossing(0) == (("key", 1, 1), ("key", 1, 3), ("value", 1, 1), ("value", 1, 3))


def test_many_readers_by_hand() -> None:
    """Values of layer 1 for all others, in stages 1 | 2 | 3 | 4 on 2 ranks: one hop, and both ranks wait."""
    sla = SLAConfig(4, 4, (), 2, share="values", source_layers=(1,))
    plan = SLAPlan(sla, PipelineLayout.of_sizes(2, [1, 1, 1, 1]))
    (route,) = plan.routes
    assert route.tensor.name == SharedTensor("value", 1, (2, 3, 4))
    assert [plan.crossing(hop) for hop in range(3)] == [(("value", 1, 1), ("value", 1, 3)), (), ()]
    stages = [plan.traffic(stage) for stage in range(4)]
    assert [(len(one.keeps), len(one.fetches)) for one in stages] == [(1, 0), (1, 0), (0, 1), (0, 1)]
    assert [one.readers for one in stages] == [{route.tensor.name: 1}, {route.tensor.name: 1}, {}, {}]


@given(st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=20)
def test_a_layout_of_another_model_is_refused(layers: int, others: int) -> None:
    """The message says both numbers of layers."""
    sla, layout = SLAConfig(layers, 2, (1,), 1), PipelineLayout.of_sizes(1, [others])
    if layers == others:
        assert SLAPlan(sla, layout).plan.layout == layout
    else:
        with pytest.raises(ValueError, match=f"layout holds {others} layers, the model {layers}"):
            _ = SLAPlan(sla, layout).plan
