"""What ``sla-plan`` predicts a step from, measured on the job's ranks: the link and the compute of the job itself."""

from __future__ import annotations

import copy
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...common.silence import silence
from ...pipeline.exchange import SMALL, Seconds, neighbour_seconds
from ..plan.compute import stage_operations
from ..plan.job import Job
from ..plan.traffic import hop_traffic
from .finding import Finding, Skipped, found
from .node_checks import FLAGS


@dataclass(frozen=True)
class Measured:
    """What was measured, the same on every rank.

    Attributes:
        job: the job as ``sla-plan`` sees it.
        padded_vocabulary: rows of the output layer that was measured.
        payload_bytes: of the larger message.
        exchanges: for each pair of neighbours, by the rank of the job that sends forward, what a small message takes,
            and what the payload.
        passes: for each rank of the job its virtual stages' (stage, forward, backward) seconds.
    """

    job: Job
    padded_vocabulary: int
    payload_bytes: int
    exchanges: dict[int, tuple[Seconds, Seconds]]
    passes: list[list[tuple[int, float, float]]]

    @property
    def is_half_duplex(self) -> bool:
        """Whether a link carries one direction at a time: both take nearly as long as one after the other."""
        return self._payload("both_ways") > _HALF_DUPLEX * self._payload("one_way")

    @property
    def transfer(self) -> float:
        """Seconds of the payload, as ``sla-plan`` counts them: one way, while as many bytes come the other way unless
        the link is half duplex."""
        return self._payload(self._way)

    @property
    def latency(self) -> float:
        """Seconds of a small message; with what the bytes take, that is what the payload takes."""
        small = statistics.median(getattr(small, self._way) for small, _ in self.exchanges.values())
        return min(small, _LATENCY_SHARE * self.transfer)

    @property
    def link_bytes(self) -> float:
        """Bytes a second."""
        return self.payload_bytes / (self.transfer - self.latency)

    @property
    def _way(self) -> str:
        return "one_way" if self.is_half_duplex else "both_ways"

    def _payload(self, way: str) -> float:
        return statistics.median(getattr(payload, way) for _, payload in self.exchanges.values())

    def operations(self) -> list[float]:
        """What each rank achieves: operations a second, as ``sla-plan`` counts them."""
        return [self._rate(stages, (0, 1)) for stages in self.passes]

    @property
    def compute(self) -> float:
        """What all ranks achieve."""
        return self._rate([stage for stages in self.passes for stage in stages], (0, 1))

    def one_way(self, direction: int) -> float:
        """Of all ranks: forward (0) or backward (1)."""
        return self._rate([stage for stages in self.passes for stage in stages], (direction,))

    def _rate(self, stages: list[tuple[int, float, float]], directions: tuple[int, ...]) -> float:
        # As much as the planner will, which has the vocabulary of the flags, or the flag that it is given.
        work = replace(self.job.work, vocabulary=self.job.work.vocabulary or self.padded_vocabulary)
        counted = stage_operations(work, self.job.shape, self.job.layout, self.job.sla, dense=self.job.sla.is_dense)
        done = sum(counted[stage][way] for stage, *_ in stages for way in directions)
        return done / sum(seconds[way] for _, *seconds in stages for way in directions)


#: From which both directions at once are one after the other: 1 is a full-duplex link, 2 a half-duplex one.
_HALF_DUPLEX = 1.5
#: Most of a payload's time that counts as latency: where a word takes as long, timing cannot tell them apart.
_LATENCY_SHARE = 0.95


def measured_rates(args: Namespace, launched: bool, reached: Callable[[str], None]) -> list[Finding]:
    """One line of figures, and the flags for ``sla-plan``; call while the job's process groups are there."""
    measured: list[Measured] = []

    def text() -> str:
        if not launched:
            raise Skipped("measured on the job's ranks alone: start it as the job is started")
        measured.append(measure(args, reached))
        return summary(measured[0])

    findings = [found("rates", text)]
    if measured:
        findings.append(Finding(FLAGS, "ok", plan_flags(measured[0])))
    return findings


def measure(args: Namespace, reached: Callable[[str], None] = lambda step: None) -> Measured:
    """Both, of the job with the validated ``args``; all ranks call it, Megatron's process groups being there."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config

    from ...model.builder import model_config_from_args
    from ..plan.settle import job_of
    from .layout import build
    from .passes import pass_seconds

    args = _as_measured(args)
    with silence():
        reached("building the job's own stages")
        model = build(args)
        job = job_of(args, model_config_from_args(args).transformer, args.overlap_p2p_comm)
        config = get_model_config(model[0])
        rank, size = parallel_state.get_pipeline_model_parallel_rank(), job.layout.pipeline_size
        reached("timing passes")
        passes = [
            (job.layout.stage(rank, chunk), *seconds)
            for chunk, seconds in enumerate(pass_seconds(args, model, job.schedule))
        ]
        payload = max((hop.payload_bytes for hop in hop_traffic(job)), default=0)
        exchanges = None
        if size > 1:
            reached("timing exchanges of neighbours")
            with_ring = job.layout.num_chunks > 1
            small, large = (
                neighbour_seconds(config, elements, with_ring) for elements in (SMALL, payload // job.element_bytes)
            )
            if rank in small:
                exchanges = small[rank], large[rank]
    reached("comparing rates")
    everybody: list[Any] = [None] * args.world_size
    torch.distributed.all_gather_object(everybody, (passes, exchanges))
    return Measured(
        job,
        args.padded_vocab_size,
        payload,
        {rank: pair for rank, (_, pair) in enumerate(everybody) if pair is not None},
        [stages for stages, _ in everybody],
    )


def _as_measured(args: Namespace) -> Namespace:
    """A copy of ``args`` that can be built without the trainer, and with the vocabulary that the trainer would find."""
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    from .data_files import vocabulary_size

    args = copy.copy(args)
    # Buffers and graphs of the trainer's making.
    args.tp_comm_overlap, args.cuda_graph_impl = False, "none"
    # What is drawn has one document.
    args.reset_attention_mask = False
    if args.padded_vocab_size is None:
        args.padded_vocab_size = calculate_padded_vocab_size(
            vocabulary_size(args), args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
        )
    return args


def plan_flags(measured: Measured) -> str:
    """The flags with which ``sla-plan``, beside those of the job, predicts a step."""
    flags = f"--compute-tflops {measured.compute / 1e12:.4g}"
    if measured.exchanges:
        flags = (
            f"--link-gb-per-s {measured.link_bytes / 1e9:.4g} --link-latency-us {measured.latency * 1e6:.4g} "
            f"{'--link-half-duplex ' * measured.is_half_duplex}{flags}"
        )
    if not measured.job.work.vocabulary:
        # No flag of the job tells it: its tokenizer does.
        flags += f" --padded-vocab-size {measured.padded_vocabulary}"
    return flags


def summary(measured: Measured) -> str:
    """The figures with their spread, and who is slowest."""
    parts = ["no pipeline, no neighbours"]
    if measured.exchanges:
        word, payload = (
            {
                way: _spread({rank: getattr(pair[which], way) * 1e3 for rank, pair in measured.exchanges.items()}, max)
                for way in ("one_way", "both_ways")
            }
            for which in (0, 1)
        )
        count = len(measured.exchanges)
        parts = [
            f"{count} pair{'s' * (count > 1)} of neighbours: {measured.payload_bytes / 1e6:.4g} MB in "
            f"{payload['one_way']} ms one way, {payload['both_ways']} ms both ways at once; a word in "
            f"{word['one_way']} and {word['both_ways']} ms"
        ]
    directions = " and ".join(
        f"{measured.one_way(way) / 1e12:.3g} {name}" for way, name in enumerate(("forward", "backward"))
    )
    tflops = {rank: each / 1e12 for rank, each in enumerate(measured.operations())}
    parts.append(f"layers achieve {_spread(tflops, min)} TFLOP/s a rank, {directions}")
    return "; ".join(parts)


def _spread(values: dict[int, float], slowest: Callable[..., int]) -> str:
    """Median, and where there are several the least, the most, and the rank of the ``slowest``, ``min`` or ``max``."""
    middle = f"{statistics.median(values.values()):.3g}"
    if len(values) == 1:
        return middle
    least, most = min(values.values()), max(values.values())
    return f"{middle} ({least:.3g}-{most:.3g}, slowest rank {slowest(values, key=values.__getitem__)})"
