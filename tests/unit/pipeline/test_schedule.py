"""The order of passes against Megatron's own schedules, which run here without processes, tensors or a model."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given

from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.schedule import Pass, Schedule

from ..strategies import SLAPlan, schedules

# Of Megatron's own making.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

#: (P, v): 1F1B and interleaved 1F1B.
PIPELINES = [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (2, 3), (3, 2), (4, 2), (4, 4), (5, 3)]

#: Upstream's flags for communication beside the computation, interleaved schedules only.
OVERLAPPING: list[dict[str, bool]] = [
    {"overlap_p2p_comm": True},
    {"overlap_p2p_comm": True, "overlap_p2p_comm_warmup_flush": True},
]

# Megatron's schedules, with stand-ins for what they call: the passes and the communication.


class Group:
    """A process group that knows its size and its rank."""

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self.size, self.rank = lambda: size, lambda: rank


@dataclass
class Log:
    """What upstream's loops do on one rank.

    Attributes:
        passes: in the order in which they run.
        sent: by direction, the passes whose result is sent, in order.
        used: by direction, for each pass the number of the payload that it is given, counted in order of arrival.
        arrived: by direction, how many payloads have been received.
        waiting: most payloads at one moment that have been received before their pass, by direction.
        waiting_in_all: the same, of both directions together.
    """

    passes: list[Pass] = field(default_factory=list)
    sent: dict[str, list[Pass]] = field(default_factory=lambda: {"F": [], "B": []})
    used: dict[str, dict[Pass, int]] = field(default_factory=lambda: {"F": {}, "B": {}})
    arrived: Counter[str] = field(default_factory=Counter)
    waiting: Counter[str] = field(default_factory=Counter)
    waiting_in_all: int = 0

    def run(self, one: Pass, payload: int | None) -> Pass:
        """A pass that is given ``payload``; its result is the pass itself."""
        self.passes.append(one)
        if payload is not None:
            self.used[one.kind][one] = payload
        return one

    def send(self, result: Pass | None) -> None:
        """A result leaves; the first stage's gradients and the last stage's outputs do not."""
        if result is not None:
            self.sent[result.kind].append(result)

    def receive(self, kind: str) -> int:
        """A payload arrives: its number."""
        self.arrived[kind] += 1
        now = {either: self.arrived[either] - len(self.used[either]) for either in "FB"}
        self.waiting[kind] = max(self.waiting[kind], now[kind])
        self.waiting_in_all = max(self.waiting_in_all, sum(now.values()))
        return self.arrived[kind] - 1


class Handle:
    """Of a transfer that needs no waiting."""

    def wait(self) -> None: ...


def stand_in_communicator(log: Log, size: int, rank: int, config: Any) -> Any:
    """Upstream's communicator, all of it but the transfers."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    class Communicator(P2PCommunicator):
        def __init__(self) -> None:
            self.pp_group, self.config = Group(size, rank), config
            self.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size

        def _communicate(self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, **_: Any) -> Any:
            log.send(tensor_send_next)
            log.send(tensor_send_prev)
            flags = {"recv_prev": recv_prev, "recv_next": recv_next, "send_next": tensor_send_next is not None}
            handles = {name: Handle() for name, wanted in flags.items() if wanted}
            return log.receive("F") if recv_prev else None, log.receive("B") if recv_next else None, handles

    return Communicator()


class Upstream:
    """Runs Megatron's schedules, one rank at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch
        from megatron.core.pipeline_parallel import schedules as loops

        self.log = Log()
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(loops, "forward_step", self._forward)
        monkeypatch.setattr(loops, "backward_step", self._backward)

    def _forward(self, *args: Any, current_microbatch: int, vp_stage: int | None = None, **_: Any) -> tuple[Pass, int]:
        return self.log.run(Pass("F", vp_stage or 0, current_microbatch), _single(args[4])), 0

    def _backward(self, input_tensor: Any, output_tensor: Any, gradient: Any, _: Any) -> Any:
        done = _single(output_tensor)
        result = self.log.run(Pass("B", done.chunk, done.microbatch), _single(gradient))
        return [result] if isinstance(input_tensor, list) else result

    def run(self, schedule: Schedule | SimpleNamespace, rank: int, **flags: bool) -> Log:
        """What ``rank`` does in ``schedule``; ``flags`` are of upstream's configuration."""
        import torch
        from megatron.core.pipeline_parallel import schedules as loops
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.transformer_config import TransformerConfig

        chunks = schedule.num_chunks
        config = TransformerConfig(
            num_layers=schedule.pipeline_size * chunks,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=schedule.pipeline_size,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            microbatch_group_size_per_vp_stage=schedule.microbatch_group_size,
            pipeline_dtype=torch.float32,
            batch_p2p_comm=not flags,
            **flags,
        )
        groups = ProcessGroupCollection()
        groups.tp, groups.cp = Group(), Group()
        model = [torch.nn.Module() for _ in range(chunks)]
        for chunk in model:
            chunk.config, chunk.model_type = config, None
        function = (
            loops.forward_backward_pipelining_with_interleaving
            if chunks > 1
            else loops.forward_backward_pipelining_without_interleaving
        )
        self.log = Log()
        function(
            forward_step_func=None,
            data_iterator=[None] * chunks,
            model=model,
            num_microbatches=schedule.num_microbatches,
            seq_length=4,
            micro_batch_size=1,
            forward_only=schedule.forward_only,
            p2p_communicator=stand_in_communicator(self.log, schedule.pipeline_size, rank, config),
            pg_collection=groups,
        )
        return self.log


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


@pytest.fixture
def upstream(megatron: None, monkeypatch: pytest.MonkeyPatch) -> Upstream:
    """Megatron's schedules with stand-ins."""
    return Upstream(monkeypatch)


# What upstream does is what the restatement says.


def settings_to_try(size: int, chunks: int, most: int = 10) -> list[tuple[int, int | None]]:
    """(M, microbatch group) up to ``most`` microbatches, with groups that do not do and, for 1F1B, none."""
    microbatches = range(1, most + 1)
    if chunks == 1:
        return [(count, None) for count in microbatches]
    sizes = [None, *range(max(size - 1, 1), most + 1)]
    return [(count, group) for count in microbatches for group in sizes]


def allowed(size: int, chunks: int, count: int, group: int | None, forward_only: bool = False) -> Schedule | None:
    """The schedule, or ``None`` where it is refused."""
    try:
        return Schedule(size, chunks, count, group, forward_only)
    except ValueError:
        return None


@pytest.mark.parametrize(("size", "chunks"), PIPELINES)
def test_table_and_warmup_are_upstream_s(upstream: Upstream, size: int, chunks: int) -> None:
    """``get_schedule_table`` and ``get_pp_rank_microbatches``, on every rank, in training and evaluation."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    for count, group in settings_to_try(size, chunks):
        for forward_only in (False, True):
            schedule = allowed(size, chunks, count, group, forward_only)
            if schedule is None:
                continue
            assert schedule.table() == get_schedule_table(count, chunks, group or size)
            for rank in range(size):
                communicator = SimpleNamespace(
                    pp_group=Group(size, rank), virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
                )
                total, all_in_warmup, warmup, remaining = get_pp_rank_microbatches(
                    count, chunks, group or size, forward_only, p2p_communicator=communicator
                )
                assert schedule.num_warmup(rank) == warmup
                assert total == len(schedule.table()) == warmup + remaining
                assert all_in_warmup == (schedule.num_warmup(rank) == len(schedule.table()))


@pytest.mark.parametrize("forward_only", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize(("size", "chunks"), PIPELINES)
def test_passes_are_upstream_s(upstream: Upstream, size: int, chunks: int, forward_only: bool) -> None:
    """Upstream's loops run these passes in this order on every rank, however they communicate."""
    every_flag = [{}, *OVERLAPPING] if chunks > 1 else [{}]
    for count, group in settings_to_try(size, chunks):
        schedule = allowed(size, chunks, count, group, forward_only)
        if schedule is not None:
            for flags in every_flag:
                for rank in range(size):
                    assert list(schedule.passes(rank)) == upstream.run(schedule, rank, **flags).passes


@pytest.mark.parametrize(("size", "chunks"), [pipeline for pipeline in PIPELINES if pipeline[1] > 1])
def test_what_upstream_refuses_is_refused(upstream: Upstream, size: int, chunks: int) -> None:
    """The same numbers of microbatches and groups as upstream, neither more nor fewer."""
    refused = 0
    for count, group in settings_to_try(size, chunks):
        numbers = SimpleNamespace(
            pipeline_size=size,
            num_chunks=chunks,
            num_microbatches=count,
            microbatch_group_size=group,
            forward_only=False,
        )
        try:
            upstream.run(numbers, 0)
        except (ValueError, RuntimeError):
            assert not upstream.log.passes
            refused += 1
            assert allowed(size, chunks, count, group) is None, (count, group)
        else:
            assert allowed(size, chunks, count, group) is not None, (count, group)
    assert refused


@pytest.mark.parametrize("forward_only", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize(("size", "chunks"), PIPELINES)
def test_upstream_s_kth_payload_sent_is_the_kth_received(
    upstream: Upstream, size: int, chunks: int, forward_only: bool
) -> None:
    """In upstream's loops a pass is given what the same microbatch's pass of the neighbouring stage sent."""
    for count, group in settings_to_try(size, chunks):
        schedule = allowed(size, chunks, count, group, forward_only)
        if schedule is None:
            continue
        logs = [upstream.run(schedule, rank) for rank in range(size)]
        for rank, log in enumerate(logs):
            for kind, step in (("F", 1), ("B", -1)):
                sent = logs[(rank - step) % size].sent[kind]
                assert len(sent) == len(log.used[kind]) == log.arrived[kind]
                for one, number in log.used[kind].items():
                    assert sent[number].microbatch == one.microbatch
                    sender = sent[number].chunk * size + (rank - step) % size
                    assert sender + step == one.chunk * size + rank


@pytest.mark.parametrize("forward_only", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize(("size", "chunks"), PIPELINES)
def test_upstream_s_early_arrivals_are_as_counted(
    upstream: Upstream, size: int, chunks: int, forward_only: bool
) -> None:
    """The most payloads that wait for their pass, in one direction and the other, add up to what ``residency`` says."""
    plan = SLAPlan(SLAConfig(1, 1, (1,), 0), PipelineLayout.of_sizes(size, [1] + [0] * (size * chunks - 1)))
    for count, group in settings_to_try(size, chunks):
        schedule = allowed(size, chunks, count, group, forward_only)
        if schedule is None:
            continue
        for rank in range(size):
            buffers = plan.residency(schedule, rank).arrival_buffers
            for flags in [{}, OVERLAPPING[0]] if chunks > 1 else [{}]:
                log = upstream.run(schedule, rank, **flags)
                assert log.waiting_in_all <= sum(log.waiting.values()) == buffers
            if chunks > 1:
                log = upstream.run(schedule, rank, **OVERLAPPING[1])
                early = plan.residency(schedule, rank, early_receives=True).arrival_buffers
                assert buffers <= sum(log.waiting.values()) == early


# The restatement by itself.


def stage(schedule: Schedule, rank: int, chunk: int) -> int:
    """The virtual stage of a rank's chunk."""
    return chunk * schedule.pipeline_size + rank


@given(schedules())
def test_every_pass_once_and_in_order(schedule: Schedule) -> None:
    """Each rank runs each forward once, and in training each backward; microbatches ascend within a chunk."""
    every = {(chunk, m) for chunk in range(schedule.num_chunks) for m in range(schedule.num_microbatches)}
    for rank in range(schedule.pipeline_size):
        passes = list(schedule.passes(rank))
        place = {one: i for i, one in enumerate(passes)}
        assert len(place) == len(passes) == len(every) * (1 if schedule.forward_only else 2)
        for kind in "F" if schedule.forward_only else "FB":
            assert {(one.chunk, one.microbatch) for one in passes if one.kind == kind} == every
            for chunk in range(schedule.num_chunks):
                microbatches = [one.microbatch for one in passes if (one.kind, one.chunk) == (kind, chunk)]
                assert microbatches == sorted(microbatches)
        if not schedule.forward_only:
            assert all(place[Pass("F", *of)] < place[Pass("B", *of)] for of in every)
        assert [one for one in passes if one.kind == "F"] == schedule.forwards()
        assert [one for one in passes if one.kind == "B"] == schedule.backwards()


@given(schedules())
def test_the_ranks_together_do_not_wait_for_ever(schedule: Schedule) -> None:
    """Each rank in its order, each pass once what it needs is done: all of them finish."""
    last = schedule.pipeline_size * schedule.num_chunks - 1
    todo = [deque(schedule.passes(rank)) for rank in range(schedule.pipeline_size)]
    done: set[tuple[str, int, int]] = set()

    def ready(kind: str, its_stage: int, microbatch: int) -> bool:
        if kind == "F":
            return its_stage == 0 or ("F", its_stage - 1, microbatch) in done
        later = its_stage == last or ("B", its_stage + 1, microbatch) in done
        return later and ("F", its_stage, microbatch) in done

    progress = True
    while progress:
        progress = False
        for rank, passes in enumerate(todo):
            while passes and ready(passes[0].kind, stage(schedule, rank, passes[0].chunk), passes[0].microbatch):
                one = passes.popleft()
                done.add((one.kind, stage(schedule, rank, one.chunk), one.microbatch))
                progress = True
    assert not any(todo)


@given(schedules())
def test_neighbours_agree_on_the_order_of_payloads(schedule: Schedule) -> None:
    """What a rank sends, pass by pass, is what the next rank needs, pass by pass, in both directions."""
    size, last = schedule.pipeline_size, schedule.pipeline_size * schedule.num_chunks - 1
    for rank in range(size):
        for kind, step, no_sender, no_receiver in (("F", 1, last, 0), ("B", -1, 0, last)):
            sends = [(stage(schedule, rank, p.chunk), p) for p in schedule.passes(rank) if p.kind == kind]
            other = (rank + step) % size
            needs = [(stage(schedule, other, p.chunk), p) for p in schedule.passes(other) if p.kind == kind]
            sent = [(its_stage + step, p.microbatch) for its_stage, p in sends if its_stage != no_sender]
            assert sent == [(its_stage, p.microbatch) for its_stage, p in needs if its_stage != no_receiver]


def test_interleaving_by_hand() -> None:
    """2 ranks, 2 chunks, 3 microbatches as one group of 3: rank 0 warms up with 5 forwards, rank 1 with 3."""
    schedule = Schedule(2, 2, 3, 3)
    assert schedule.table() == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert [schedule.num_warmup(rank) for rank in (0, 1)] == [5, 3]
    written = ["".join(f"{kind}{chunk}{m} " for kind, chunk, m in schedule.passes(rank)) for rank in (0, 1)]
    assert written[0] == "F00 F01 F02 F10 F11 F12 B10 B11 B12 B00 B01 B02 "
    assert written[1] == "F00 F01 F02 F10 B10 F11 B11 F12 B12 B00 B01 B02 "


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ((2, 1, 0), "num_microbatches must be at least 1: 0"),
        ((4, 2, 8, 3), r"4 \(pipeline size\) <= 3 \(microbatch group\)"),
        ((4, 2, 3), r"4 \(microbatch group\) <= 3 \(microbatches\)"),
        ((2, 2, 4, 5), r"5 \(microbatch group\) <= 4 \(microbatches\)"),
        ((2, 2, 4, 3), "4 microbatches leave a last group of 1, fewer than the pipeline size 2"),
    ],
    ids=["no-microbatch", "group-below-P", "fewer-microbatches-than-P", "group-beyond-M", "last-group-below-P"],
)
def test_numbers_that_do_not_run_are_refused(numbers: tuple[int, ...], named: str) -> None:
    """A ValueError that says the numbers."""
    with pytest.raises(ValueError, match=named):
        Schedule(*numbers)
