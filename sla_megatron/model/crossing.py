"""What a block does so that tensors of its layers reach later layers: one implementation for every kind of block.

Its forward opens a microbatch, unpacks what arrives from another pipeline stage, and packs what leaves.  It is mixed in
before an upstream class (``transformer_block.py``, ``hybrid_stack.py``), whose own forward runs in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from ..pipeline.declarations import Declarations, Name
from ..pipeline.layout import PipelineLayout
from ..pipeline.routes import RoutePlan, StageTraffic
from ..pipeline.step import current_step
from ..pipeline.transport import install_transport
from ..pipeline.waiting import microbatch
from ..upstream.seams import OneOf, Seam, SeamError, replaced


class CrossLayerBlock:
    """Mixed in before an upstream block: its forward is one microbatch of tensors that cross layers.

    Of the block it reads ``config``, ``layers`` with their ``layer_number``, ``pg_collection`` and ``input_tensor``,
    which upstream's schedules set.

    Attributes:
        checkpoint_seams: what full recomputation replaces while a forward of this kind of block runs.
        declared: the tensors that cross layers, as this tensor-parallel rank has them.
        uses: how often each is taken in this block.
        route_plan: where they go between the stages of a pipeline; ``None`` without one.
        traffic: what this virtual stage does of it.
    """

    checkpoint_seams: ClassVar[tuple[Seam | OneOf, ...]] = ()
    declared: Declarations
    uses: Mapping[Name, int]
    route_plan: RoutePlan | None = None
    traffic: StageTraffic | None = None

    def join_pipeline(self, declared: Declarations, layout: Callable[[], PipelineLayout], chunk: int) -> None:
        """Learn what this block's layers share, and what crosses the ends of its stage.  To be called once.

        Args:
            declared: all tensors that cross layers.
            layout: the layers of each virtual stage; asked for with a pipeline only.
            chunk: which model chunk of its rank this is.

        Raises:
            ValueError: where tensors are declared for another tensor-parallel size.
            SeamError: where Megatron built other layers than ``layout()`` says.
        """
        groups = self.pg_collection
        tensor_rank, tensor_size = get_pg_rank(groups.tp), get_pg_size(groups.tp)
        if declared.tensors and len(declared.tensors[0].widths) != tensor_size:
            raise ValueError(f"{declared} has widths for other ranks than the {tensor_size} tensor-parallel ones")
        self.declared = declared.on_rank(tensor_rank)
        numbers = tuple(layer.layer_number for layer in self.layers)
        if self.config.pipeline_model_parallel_size == 1:
            self.uses = self.declared.reads_within(numbers)
            return
        self.route_plan = RoutePlan(declared, layout())
        layers = self.route_plan.layout
        stage = layers.stage(get_pg_rank(groups.pp), chunk)
        if numbers != layers.stages[stage]:
            raise SeamError(
                f"Megatron built layers {numbers} in virtual stage {stage}, expected {layers.stages[stage]}"
            )
        self.traffic = self.route_plan.traffic(stage, tensor_rank)
        self.uses = self.traffic.uses
        if not self.route_plan.moves_nothing:
            install_transport()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As upstream; with pipeline stages the input may be a payload, and the result is one where tensors leave.

        Raises ``RuntimeError`` for inference contexts: Megatron-side generation is not supported.
        """
        if kwargs.get("inference_context") is not None or kwargs.get("inference_params") is not None:
            raise RuntimeError("Megatron-side text generation is not supported with --sla")
        # Installed only where upstream will call it: a seam's checks do not belong in every microbatch.
        recomputes = self.config.recompute_granularity == "full" and self.training
        with replaced(self.checkpoint_seams if recomputes else ()), microbatch(self.uses) as held:
            if self.traffic is None or self.traffic.is_none:
                return super().forward(*args, **kwargs)
            step = current_step()
            self.input_tensor = step.enter(self.traffic, held, self.input_tensor, keeps_reads=recomputes)
            hidden_states = super().forward(*args, **kwargs)
            # Upstream would hold on to it until the next microbatch.
            self.input_tensor = None
            return step.leave(self.traffic, held, hidden_states)
