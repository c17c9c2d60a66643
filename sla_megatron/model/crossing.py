"""What a block does so that tensors of its layers reach later layers: one implementation for every kind of block.

Its forward opens a microbatch, unpacks what arrives from another pipeline stage, and packs what leaves.  It is mixed in
before an upstream class (``transformer_block.py``, ``hybrid_stack.py``), whose own forward runs in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from ..attention.microbatch_kv import microbatch
from ..attention.sla_config import SLAConfig
from ..pipeline.layout import PipelineLayout
from ..pipeline.routes import RoutePlan, StageTraffic
from ..pipeline.step import current_step
from ..pipeline.transport import install_transport
from ..upstream.seams import OneOf, Seam, SeamError, replaced


class CrossLayerBlock:
    """Mixed in before an upstream block: its forward is one microbatch of shared K/V.

    Of the block it reads ``config``, ``layers`` with their ``layer_number``, ``pg_collection`` and ``input_tensor``,
    which upstream's schedules set.

    Attributes:
        checkpoint_seams: what full recomputation replaces while a forward of this kind of block runs.
        route_plan: where K/V go between the stages of a pipeline; ``None`` without one.
        traffic: what this virtual stage does of it.
    """

    checkpoint_seams: ClassVar[tuple[Seam | OneOf, ...]] = ()
    route_plan: RoutePlan | None = None
    traffic: StageTraffic | None = None

    def join_pipeline(self, sla: SLAConfig, layout: Callable[[], PipelineLayout], chunk: int) -> None:
        """Plan what crosses the ends of this stage, model chunk ``chunk`` of its rank; nothing without a pipeline.

        Raises ``SeamError`` where Megatron built other layers than ``layout()`` says.
        """
        if self.config.pipeline_model_parallel_size == 1:
            return
        groups = self.pg_collection
        self.route_plan = RoutePlan(sla, layout(), get_pg_size(groups.tp))
        layers = self.route_plan.layout
        stage = layers.stage(get_pg_rank(groups.pp), chunk)
        built = tuple(layer.layer_number for layer in self.layers)
        if built != layers.stages[stage]:
            raise SeamError(f"Megatron built layers {built} in virtual stage {stage}, expected {layers.stages[stage]}")
        self.traffic = self.route_plan.traffic(stage, get_pg_rank(groups.tp))
        if not self.route_plan.moves_nothing:
            install_transport()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As upstream; with pipeline stages the input may be a payload, and the result is one where K/V leave.

        Raises ``RuntimeError`` for inference contexts: Megatron-side generation is not supported.
        """
        if kwargs.get("inference_context") is not None or kwargs.get("inference_params") is not None:
            raise RuntimeError("Megatron-side text generation is not supported with --sla")
        # Installed only where upstream will call it: a seam's checks do not belong in every microbatch.
        recomputes = self.config.recompute_granularity == "full" and self.training
        with replaced(self.checkpoint_seams if recomputes else ()), microbatch() as kv:
            if self.traffic is None or self.traffic.is_none:
                return super().forward(*args, **kwargs)
            step = current_step()
            self.input_tensor = step.enter(self.traffic, kv, self.input_tensor, keeps_reads=recomputes)
            hidden_states = super().forward(*args, **kwargs)
            # Upstream would hold on to it until the next microbatch.
            self.input_tensor = None
            return step.leave(self.traffic, kv, hidden_states)
