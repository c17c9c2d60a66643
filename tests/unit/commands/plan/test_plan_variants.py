"""What ``sla-plan`` says of any mixture of what is shared and from where: bytes, what waits, costs, layouts.

Expectations are counted one tensor of a (layer, group) after the other, by the specification's words.
"""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.commands.plan.as_json import as_json
from sla_megatron.commands.plan.compute import stage_operations
from sla_megatron.commands.plan.costs import costs
from sla_megatron.commands.plan.figures import Figures
from sla_megatron.commands.plan.job import Job, Parameters
from sla_megatron.commands.plan.report import report
from sla_megatron.commands.plan.suggest import suggest, virtual_stages
from sla_megatron.commands.plan.traffic import hop_traffic, rank_memory, totals

from ...strategies import SLAPlan, layouts, sla_configs
from .test_plan_report import job, of_plan
from .variants import readers


@st.composite
def any_jobs(draw: st.DrawFn) -> Job:
    """A run of any pattern in any pipeline that has a schedule for it."""
    size = draw(st.sampled_from([1, 2]))
    sla = draw(sla_configs(st.just(size * draw(st.integers(1, 3)))))
    return of_plan(SLAPlan(sla, draw(layouts(sla.num_layers)), size))


def readers_by_stage(of: Job) -> dict[tuple[str, int, int], list[int]]:
    """(kind, source layer, group) -> the other stages that read it, ascending; those that none reads are left out."""
    stage_of = of.layout.stage_of
    found = {
        tensor: sorted({stage_of[reader] for reader in reading} - {stage_of[tensor[1]]})
        for tensor, reading in readers(of.sla).items()
    }
    return {tensor: stages for tensor, stages in found.items() if stages}


@given(any_jobs())
def test_bytes_are_the_bound_tensor_by_tensor(of: Job) -> None:
    """Section 3: each tensor once over the hops to its furthest reader round the ring, ``(q/C) b d`` elements."""
    size, ranks = of.layout.pipeline_size, of.shape.tensor_parallel_size
    counts = [[0] * ranks for _ in range(of.layout.num_stages - 1)]
    relayed = [[0] * ranks for _ in counts]
    for (_, layer, group), stages in readers_by_stage(of).items():
        first, rank = of.layout.stage_of[layer], group * ranks // of.sla.num_query_groups
        for hop in range(first, first + max((stage - first) % size for stage in stages)):
            counts[hop][rank] += 1
        for hop in range(first, stages[-1]):
            relayed[hop][rank] += 1
    tensor = 24 * 2 * 4 * 4
    assert [hop.kv_bytes for hop in hop_traffic(of)] == [max(each) * tensor for each in counts]
    sums = totals(of)
    assert sums.kv == 2 * sum(map(max, counts)) * tensor
    assert sums.relayed - sums.dense == 2 * sum(map(max, relayed)) * tensor


@given(any_jobs())
def test_residents_are_what_waits_tensor_by_tensor(of: Job) -> None:
    """Pass by pass: a tensor waits on a rank until its last reader there, its gradient from there on back."""
    assume(of.runs)
    size, ranks = of.layout.pipeline_size, of.shape.tensor_parallel_size
    for memory in rank_memory(of):
        # (stage in which it comes to the rank, stage of its last reader there), for each tensor-parallel rank.
        waiting: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
        for (_, layer, group), stages in readers_by_stage(of).items():
            first = of.layout.stage_of[layer]
            here = [stage for stage in stages if stage % size == memory.rank]
            arrives = first + (memory.rank - first) % size
            if here and here[-1] > arrives:
                waiting[group * ranks // of.sla.num_query_groups].append((arrives, here[-1]))
        peaks = []
        for tensors in waiting:
            held: set[tuple[int, int, str]] = set()
            most = 0
            for kind, chunk, microbatch in of.schedule.passes(memory.rank):
                stage = chunk * size + memory.rank
                for number, (comes, goes) in enumerate(tensors):
                    begins, ends = (comes, goes) if kind == "F" else (goes, comes)
                    if stage == begins:
                        held.add((number, microbatch, kind))
                    elif stage == ends:
                        held.remove((number, microbatch, kind))
                most = max(most, len(held))
            assert not held
            peaks.append(most)
        assert memory.resident_bytes == max(peaks) * 24 * 2 * 4 * 4


def one_source(of: Job, **changes: object) -> Job:
    """``of`` with the values of layer 1 read by groups 1 and 3 of all later layers."""
    return replace(of, sla=SLAConfig(of.sla.num_layers, 4, (), 2, None, "full", "values", (1,)), **changes)


def test_one_source_and_many_readers() -> None:
    """By hand: four stages of one layer on two ranks, two microbatches; a tensor is 64 x 2 x 8 elements of 2 bytes.

    Layer 1's values of two groups go from rank 0 to rank 1 once, and wait on each until its second stage has run.
    """
    of = one_source(job((1, 1, 1, 1), pipeline_size=2, global_batch_size=4))
    tensor = 64 * 2 * 8 * 2
    assert [hop.kv_bytes for hop in hop_traffic(of)] == [2 * tensor, 0, 0]
    # Relayed, they would cross all three hops.
    assert totals(of).relayed - totals(of).dense == 2 * 3 * 2 * tensor
    # Of both microbatches at once: rank 0 runs its first stage twice, and rank 1 does so before it goes on.
    assert [one.resident_bytes for one in rank_memory(of)] == [2 * 2 * tensor] * 2
    text = report(Figures.of(of))
    first_hop = next(line for line in text.splitlines() if line.startswith("    0  0 -> 1"))
    assert first_hop.split() == "0 0 -> 1 8.00 KiB 4.00 KiB 12.00 KiB 1.500 1: 1,3 for 2-4".split()
    assert "no values" in text and "values of layers: groups" in text and "resident values" in text
    tables = text[text.index("Each hop") : text.index("Beside")] + text[text.index("Bytes are exact") :]
    assert "K/V" not in tables
    (first,), *others = (hop["kv"][:1] for hop in json.loads(as_json(Figures.of(of)))["hops"])
    assert first == {
        "layer": 1,
        "reader": 2,
        "groups": [1, 3],
        "tensors": ["value"],
        "stack_layer": 1,
        "stack_reader": 2,
    }
    assert others == [[], []]


def test_suggestions_for_one_source() -> None:
    """Whatever the number of virtual stages, the last rank round the ring reads it: P - 1 hops, and no fewer ranks."""
    of = one_source(job((6, 6), pipeline_size=2, num_gpus=4, global_batch_size=32))
    tensor = 64 * 2 * 8 * 2
    found = [(one.job.layout.pipeline_size, one.totals.kv, one.resident_bytes) for one in suggest(of)]
    assert [(size, kv) for size, kv, _ in found] == [(size, 2 * (size - 1) * 2 * tensor) for size in (2, 2, 2, 2, 4, 4)]
    # Without interleaving nothing waits, so that it is the first of its size.
    assert [resident for _, _, resident in found].index(0) == 0 and found[4][2] == 0
    assert all(one.kv_bytes == 2 * 2 * tensor for one in virtual_stages(of))


@given(any_jobs())
def test_costs_are_those_of_single_tensors(of: Job) -> None:
    """One (kind, layer, group) after the other: rows of 16 weights for each of 4 channels, twice for a product."""
    of = replace(of, parameters=Parameters(1000, 900))
    reading = readers(of.sla)
    dead = sum(not found for found in reading.values())
    found = costs(of)
    assert found.dense.cache_bytes == len(reading) * 4 * 4
    assert found.full.cache_bytes == found.pruned.cache_bytes == (len(reading) - dead) * 4 * 4
    assert found.dense.operations == found.full.operations == found.pruned.operations + dead * 4 * 16 * 2
    assert (found.dense.parameters, found.full.parameters, found.pruned.parameters) == (1000, 1000, 900)
    assert found.dense.wire_bytes == totals(of).dense
    assert found.full.wire_bytes == found.pruned.wire_bytes == totals(of).payload
    # The timeline's stages have what the model has: of a stage, the rows that its own layers leave out.
    pruned = replace(of.sla, kv_projection="pruned")
    stages = zip(
        *(
            stage_operations(of.work, of.shape, of.layout, sla)
            for sla in (replace(pruned, kv_projection="full"), pruned)
        ),
        of.layout.stages,
        strict=True,
    )
    for (full, _), (less, _), layers in stages:
        left_out = sum(not found for (_, layer, _), found in reading.items() if layer in layers)
        assert full - less == left_out * 4 * 16 * 2 * 24 * 2 / of.shape.tensor_parallel_size


def test_a_dense_cache_and_skipv1s() -> None:
    """Half of the heads read layer 1's values: of 2 x 12 x 4 tensors a token 11 x 2 are not kept."""
    of = one_source(job(parameters=Parameters(2_000_000, 1_900_000)))
    found = costs(of)
    assert (found.dense.cache_bytes, found.full.cache_bytes) == (96 * 8 * 2, (96 - 22) * 8 * 2)
    rows = [line.split() for line in report(Figures.of(of)).splitlines()]
    assert "parameters 2.00M 2.00M 1.000 1.90M 0.950".split() in rows
    assert "K/V kept for a token in generation 1.50 KiB 1.16 KiB 0.771 1.16 KiB 0.771".split() in rows
    assert "dense full* / dense pruned / dense".split() in rows
    assert json.loads(as_json(Figures.of(of)))["costs"]["pruned"] == vars(found.pruned)
    assert "parameters" not in report(Figures.of(job()))


def test_json_says_what_skips() -> None:
    of = one_source(job())
    assert json.loads(as_json(Figures.of(of)))["sla"] == {
        "share": "values",
        "skip_distances": [],
        "source_layers": [1],
        "skip_groups": [1, 3],
        "layers": list(range(2, 13)),
        "kv_projection": "full",
        "dead": {"key": 0, "value": 22},
    }
