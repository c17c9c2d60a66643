"""The pretraining run that ``sla-plan`` is asked about.  Pure Python; ``settle.py`` makes it of Megatron's flags."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from ...attention.declared import declare
from ...attention.sla_config import SLAConfig
from ...common.errors import StartError
from ...pipeline.declarations import Declarations
from ...pipeline.layout import PipelineLayout
from ...pipeline.payload import MicrobatchShape
from ...pipeline.routes import RoutePlan
from ...pipeline.schedule import Schedule
from .compute import ModelWork
from .program import Communication


class PlanError(StartError):
    """What keeps a plan from being made, as one line."""


class Parameters(NamedTuple):
    """Of the whole model: as the dense one has them, and without the K/V projections that nobody reads."""

    dense: int
    pruned: int


@dataclass(frozen=True)
class Job:
    """One run: model, layout, batch.

    Attributes:
        sla: what skip-layer attention means in the model.
        layout: the layers of each virtual stage.
        shape: the sizes of a microbatch.
        work: what decides the model's compute.
        element_bytes: size of an element of what crosses a hop.
        num_gpus: the world size.
        global_batch_size: samples of a step.
        group_size: ``--microbatch-group-size-per-virtual-pipeline-stage``; ``None``: the pipeline size.
        expert_gpus: GPUs over which the experts of a stage are spread; the world size is a multiple of it times ``P``.
        communication: how interleaved transfers meet compute; 1F1B never overlaps.
        description: skip-layer attention in one line.
        parameters: how many the model has; ``None`` where they are not counted.
    """

    sla: SLAConfig
    layout: PipelineLayout
    shape: MicrobatchShape
    work: ModelWork
    element_bytes: int
    num_gpus: int
    global_batch_size: int
    group_size: int | None = None
    expert_gpus: int = 1
    communication: Communication = Communication(overlap=True)
    description: str = ""
    parameters: Parameters | None = None

    @cached_property
    def declared(self) -> Declarations:
        """The tensors that cross layers, all that the bytes come from."""
        return declare(self.sla, self.work.numbers, self.shape.tensor_parallel_size, self.work.head_size)

    @cached_property
    def plan(self) -> RoutePlan:
        """What crosses each hop."""
        return RoutePlan(self.declared, self.layout)

    @cached_property
    def tensor_ranks(self) -> tuple[int, ...]:
        """One tensor-parallel rank of each kind: the ranks of a kind have equally much of every tensor."""
        kinds: dict[tuple[int, ...], int] = {}
        for rank in range(self.shape.tensor_parallel_size):
            kinds.setdefault(tuple(route.tensor.widths[rank] for route in self.plan.routes), rank)
        return tuple(kinds.values())

    @property
    def pattern(self) -> str:
        """Of a hybrid model, its ``--hybrid-layer-pattern`` with a ``|`` where this layout has one; else ``""``."""
        kinds = self.work.kinds
        return "|".join("".join(kinds[layer - 1] for layer in stage) for stage in self.layout.stages) if kinds else ""

    @property
    def data_parallel_size(self) -> int:
        """Pipelines that run side by side on different samples."""
        return self.num_gpus // self.gpus_of_pipeline

    @property
    def gpus_of_pipeline(self) -> int:
        """``T * C * P``."""
        shape = self.shape
        return shape.tensor_parallel_size * shape.context_parallel_size * self.layout.pipeline_size

    @cached_property
    def schedule(self) -> Schedule:
        """A training step's schedule.  Raises :class:`PlanError` where the batch or interleaving does not allow one."""
        samples = self.shape.microbatch_size * self.data_parallel_size
        if self.global_batch_size % samples:
            raise PlanError(
                f"--global-batch-size {self.global_batch_size}: expected a multiple of {samples}, "
                f"--micro-batch-size {self.shape.microbatch_size} times data-parallel size {self.data_parallel_size}"
            )
        chunks = self.layout.num_chunks
        try:
            return Schedule(
                self.layout.pipeline_size,
                chunks,
                self.global_batch_size // samples,
                self.group_size if chunks > 1 else None,
            )
        except ValueError as error:
            raise PlanError(
                f"--global-batch-size {self.global_batch_size} does not suit {chunks} virtual stages a rank: {error}"
            ) from None

    def split_evenly(self, pipeline_size: int, num_chunks: int) -> Job:
        """The same model and batch on the same GPUs, with as many layers in each of ``P * v`` virtual stages."""
        stages, layers = pipeline_size * num_chunks, self.layout.num_layers
        even = PipelineLayout.of_sizes(pipeline_size, [layers // stages] * stages)
        return replace(self, layout=replace(even, further_tokens=self.layout.further_tokens))

    def require_runnable(self) -> None:
        """Raise :class:`PlanError` where GPUs or batch do not divide, or Megatron has no schedule for the layout."""
        size, chunks = self.layout.pipeline_size, self.layout.num_chunks
        if self.num_gpus % self.gpus_of_pipeline or self.num_gpus % (self.expert_gpus * size):
            raise PlanError(f"{self.num_gpus} GPUs do not divide over pipelines of {size} ranks")
        if chunks > 1 and size < (fewest := 2 if self.communication.overlap else 3):
            raise PlanError(f"interleaving needs {fewest} pipeline ranks or more")
        _ = self.schedule

    @property
    def runs(self) -> bool:
        """Whether :meth:`require_runnable` has nothing against it."""
        try:
            self.require_runnable()
        except PlanError:
            return False
        return True
