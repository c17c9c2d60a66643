"""Every figure of a plan, as ``report`` and ``as_json`` show them.  Pure Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .costs import Costs, costs
from .job import Job
from .predict import Prediction, Rates, predict
from .suggest import Layout, VirtualStages, suggest, virtual_stages
from .traffic import HopTraffic, RankMemory, Totals, hop_traffic, rank_memory, totals


@dataclass(frozen=True)
class Figures:
    """What ``sla-plan`` has to say about a run.

    Attributes:
        job: the run.
        hops: bytes of each hop.
        ranks: bytes on each pipeline rank.
        totals: bytes over all hops.
        costs: what the model costs beside the dense one.
        stages: the numbers of virtual stages that split the layers evenly.
        rates: what the step was simulated with; ``None``: it was not.
        prediction: the simulated step; ``None`` without rates.
        layouts: other layouts, the best first; empty unless asked for.
    """

    job: Job
    hops: tuple[HopTraffic, ...]
    ranks: tuple[RankMemory, ...]
    totals: Totals
    costs: Costs
    stages: tuple[VirtualStages, ...]
    rates: Rates | None
    prediction: Prediction | None
    layouts: tuple[Layout, ...]

    @classmethod
    def of(
        cls,
        job: Job,
        rates: Rates | None = None,
        with_suggestions: bool = False,
        progress: Callable[[str], None] = lambda line: None,
    ) -> Figures:
        """All figures of ``job``.  Raises :class:`PlanError` where it does not run."""
        job.require_runnable()
        return cls(
            job=job,
            hops=hop_traffic(job),
            ranks=rank_memory(job),
            totals=totals(job),
            costs=costs(job),
            stages=tuple(virtual_stages(job)),
            rates=rates,
            prediction=None if rates is None else predict(job, rates),
            layouts=tuple(suggest(job, rates, progress)) if with_suggestions else (),
        )
