"""The transformer block of a skip-layer model: opens a microbatch, and between pipeline stages packs and unpacks it.

Megatron's models name their block's class; while one is built, that name is ours (:func:`sla_transformer_blocks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from ..attention.microbatch_kv import microbatch
from ..attention.sla_config import SLAConfig
from ..pipeline.megatron_layout import pipeline_layout
from ..pipeline.routes import RoutePlan, StageTraffic
from ..pipeline.step import current_step
from ..pipeline.transport import install_transport
from ..upstream.seams import Reliance, Seam, SeamError, replaced
from .layer_specs import Spec, sla_layer_spec, torch_attention_in_further_layers, torch_attention_spec
from .recomputation import CHECKPOINTED_FORWARD
from .schedule_plan import install_sharing_in_plans

#: Called with whatever they are given, so that no signature is assumed.
OVERRIDDEN = (
    Reliance(
        "megatron.core.transformer.transformer_block:TransformerBlock.__init__",
        "overridden by SLATransformerBlock, to build SLA layers and plan what crosses its stage's ends",
    ),
    Reliance(
        "megatron.core.transformer.transformer_block:TransformerBlock.forward",
        "overridden by SLATransformerBlock, to open a microbatch",
    ),
)


class SLATransformerBlock(TransformerBlock):
    """Upstream's ``TransformerBlock``, whose forward is one microbatch of shared K/V.

    Args:
        spec: of a layer or of the block, with upstream's self-attention, which is replaced (``layer_specs.py``).
        sla: the model's skip-layer attention; the other arguments are upstream's.

    Attributes:
        route_plan: where K/V go between the stages of a pipeline; ``None`` without one.
        traffic: what this virtual stage does of it.
    """

    def __init__(self, config: TransformerConfig, spec: Spec, *args: Any, sla: SLAConfig, **kwargs: Any) -> None:
        super().__init__(config, sla_layer_spec(spec, sla), *args, **kwargs)
        self.route_plan: RoutePlan | None = None
        self.traffic: StageTraffic | None = None
        if config.pipeline_model_parallel_size > 1:
            self._join_pipeline(sla)
        if config.overlap_moe_expert_parallel_comm:
            install_sharing_in_plans()

    def _join_pipeline(self, sla: SLAConfig) -> None:
        groups = self.pg_collection
        self.route_plan = RoutePlan(sla, pipeline_layout(self.config), get_pg_size(groups.tp))
        layout = self.route_plan.layout
        stage = layout.stage(get_pg_rank(groups.pp), self.vp_stage or 0)
        built = tuple(layer.layer_number for layer in self.layers)
        if built != layout.stages[stage]:
            raise SeamError(f"Megatron built layers {built} in virtual stage {stage}, expected {layout.stages[stage]}")
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
        with replaced([CHECKPOINTED_FORWARD] if recomputes else []), microbatch() as kv:
            if self.traffic is None or self.traffic.is_none:
                return super().forward(*args, **kwargs)
            step = current_step()
            self.input_tensor = step.enter(self.traffic, kv, self.input_tensor, keeps_reads=recomputes)
            hidden_states = super().forward(*args, **kwargs)
            # Upstream would hold on to it until the next microbatch.
            self.input_tensor = None
            return step.leave(self.traffic, kv, hidden_states)


def torch_attention_block(config: TransformerConfig, spec: Spec, *args: Any, block: Any, **kwargs: Any) -> Any:
    """``block``, a transformer block's class or what stands for it, with torch's function as its core attention."""
    return block(config, torch_attention_spec(spec), *args, **kwargs)


#: Where Megatron's models are that name their block's class, as ``TransformerBlock``.
GPT_MODEL = "megatron.core.models.gpt.gpt_model"
BERT_MODEL = "megatron.core.models.bert.bert_model"


def transformer_block_seam(sla: SLAConfig | None, module: str = GPT_MODEL, torch_attention: bool = False) -> Seam:
    """Have the model of ``module`` build its block, a GPT's decoder or a BERT's encoder, for ``sla``.

    Args:
        sla: what skip-layer attention means in the model; ``None``: it is dense.
        module: where the model names its block's class.
        torch_attention: whether its core attention is torch's.
    """
    block: Any = TransformerBlock if sla is None else partial(SLATransformerBlock, sla=sla)
    return Seam(
        f"{module}:TransformerBlock",
        "the model names its block's class there; only while an SLA model, or one with torch's attention, is built",
        ("config", "spec", "post_layer_norm", "pre_process", "post_process", "pg_collection", "vp_stage"),
        stand_in=partial(torch_attention_block, block=block) if torch_attention else block,
    )


def _torch_attention_further_block(config: TransformerConfig, spec: Any, *args: Any, **kwargs: Any) -> Any:
    return MultiTokenPredictionBlock(config, torch_attention_in_further_layers(spec), *args, **kwargs)


#: Layers that predict further tokens (``--mtp-num-layers``) have no skip heads: a GPT's own block of them stays.
FURTHER_LAYERS = Seam(
    f"{GPT_MODEL}:MultiTokenPredictionBlock",
    "the layers that predict further tokens have torch's core attention too; only while a model with it is built",
    (
        "config",
        "spec",
        "vp_stage",
        "pg_collection",
        "mtp_layer_pattern",
        "mtp_num_depths",
        "hybrid_submodules",
        "mamba_submodules",
        "name",
    ),
    stand_in=_torch_attention_further_block,
)


@contextmanager
def sla_transformer_blocks(
    sla: SLAConfig | None, model: type | None = None, torch_attention: bool = False
) -> Iterator[None]:
    """Within the block, ``GPTModel(...)`` builds its decoder as an :class:`SLATransformerBlock` for ``sla``.

    Args:
        sla: what skip-layer attention means in the model; ``None``: it is dense.
        model: another of Megatron's models, in place of ``GPTModel``: ``BertModel``, whose attention looks both ways.
        torch_attention: whether its core attention is torch's, as with ``--core-attention sdpa``.

    Raises:
        SeamError: where the module of ``model`` does not name its block's class as Megatron's models do.
    """
    if sla is not None:
        CHECKPOINTED_FORWARD.require()  # A changed upstream is found now, not in the first step.
    module = GPT_MODEL if model is None else model.__module__
    seams = [transformer_block_seam(sla, module, torch_attention)]
    if torch_attention and module == GPT_MODEL:
        seams.append(FURTHER_LAYERS)
    with replaced(seams):
        yield
