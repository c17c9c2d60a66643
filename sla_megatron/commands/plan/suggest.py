"""Other layouts for the same model, batch and GPUs, the best first.  Pure Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .job import Job, PlanError
from .predict import Prediction, Rates, predict
from .traffic import Totals, rank_memory, totals


@dataclass(frozen=True)
class VirtualStages:
    """One number of virtual stages for the given pipeline size.

    Attributes:
        num_chunks: ``v``.
        layers: layers of each virtual stage.
        kv_bytes: K/V over all hops, forward and backward, for one microbatch; 0 where they are local to their rank.
        obstacle: why the schedule does not run so; ``None`` where it does.
    """

    num_chunks: int
    layers: int
    kv_bytes: int
    obstacle: str | None


@dataclass(frozen=True)
class Layout:
    """One pipeline size and number of virtual stages.

    Attributes:
        job: the run in that layout.
        totals: its bytes.
        resident_bytes: K/V that wait on the rank that holds most.
        prediction: its step; ``None`` without rates.
        is_given: whether it is the layout that the flags ask for.
    """

    job: Job
    totals: Totals
    resident_bytes: int
    prediction: Prediction | None
    is_given: bool


def virtual_stages(job: Job) -> list[VirtualStages]:
    """Every number of virtual stages that splits the layers evenly over ``job``'s pipeline ranks."""
    size, layers = job.layout.pipeline_size, job.layout.num_layers
    found = []
    for chunks in _divisors(layers // size) if layers % size == 0 else ():
        even, obstacle = job.split_evenly(size, chunks), None
        try:
            even.require_runnable()
        except PlanError as error:
            obstacle = str(error)
        found.append(VirtualStages(chunks, layers // (size * chunks), totals(even).kv, obstacle))
    return found


def suggest(job: Job, rates: Rates | None = None, progress: Callable[[str], None] = lambda line: None) -> list[Layout]:
    """Layouts with two pipeline ranks or more, the given one among them, the best first.

    They are ranked by step time where rates are given, then by K/V on the wire, then by resident K/V.  The samples of a
    step, and the tensor- and context-parallel sizes, stay.  ``progress`` hears of each layout.
    """
    jobs = [job]
    for size in _divisors(job.layout.num_layers):
        for chunks in _divisors(job.layout.num_layers // size) if size > 1 else ():
            even = job.split_evenly(size, chunks)
            if even.layout != job.layout and even.runs:
                jobs.append(even)
    layouts = []
    for number, one in enumerate(jobs, 1):
        progress(
            f"layout {number} of {len(jobs)}: PP {one.layout.pipeline_size}, {one.layout.num_chunks} stages a rank"
        )
        resident = max(rank.resident_bytes for rank in rank_memory(one))
        layouts.append(Layout(one, totals(one), resident, predict(one, rates) if rates else None, one is job))
    return sorted(
        layouts,
        key=lambda one: (
            0.0 if one.prediction is None else one.prediction.sla.step_time,
            one.totals.kv,
            one.resident_bytes,
            one.job.layout.pipeline_size,
            one.job.layout.num_chunks,
        ),
    )


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
