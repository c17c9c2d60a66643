"""The transformer block of a skip-layer model: opens a microbatch, and recomputes with K/V as explicit inputs.

Between pipeline stages it is the block that unpacks what arrives and packs what leaves (``pipeline/``).

Upstream's full recomputation re-runs a chunk of layers during backward, through reentrant checkpointing: only tensors
that are *arguments* of the checkpointed function get gradients.  K/V that reached a chunk by any other way would yield
the right loss with wrong gradients, silently.  So each chunk here takes the bundles that its layers read as arguments,
and returns the ones that later layers read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from ..attention.microbatch_kv import current, microbatch
from ..attention.roles import BundleName
from ..attention.self_attention import SLASelfAttention
from ..attention.sla_config import SLAConfig
from ..pipeline.megatron_layout import pipeline_layout
from ..pipeline.routes import RoutePlan, StageTraffic
from ..pipeline.step import current_step
from ..pipeline.transport import install_transport
from ..upstream.seams import Seam, SeamError, replaced


class SLATransformerBlock(TransformerBlock):
    """Upstream's ``TransformerBlock``, whose forward is one microbatch of shared K/V.

    Args:
        sla: the model's skip-layer attention; the other arguments are upstream's.

    Attributes:
        route_plan: where K/V go between the stages of a pipeline; ``None`` without one.
        traffic: what this virtual stage does of it.
        ranks_agree: whether the ranks of the pipeline were found to have the same plan (``transport.py``).
    """

    def __init__(self, config: TransformerConfig, *args: Any, sla: SLAConfig, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.route_plan: RoutePlan | None = None
        self.traffic: StageTraffic | None = None
        self.ranks_agree = False
        if config.pipeline_model_parallel_size > 1:
            self._join_pipeline(sla)

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
            if not self.traffic:
                return super().forward(*args, **kwargs)
            step = current_step()
            self.input_tensor = step.enter(self.traffic, kv, self.input_tensor, keeps_reads=recomputes)
            hidden_states = super().forward(*args, **kwargs)
            # Upstream would hold on to it until the next microbatch.
            self.input_tensor = None
            return step.leave(self.traffic, kv, hidden_states)


def _checkpointed_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    context: Tensor | None,
    context_mask: Tensor | None,
    rotary_pos_emb: Any,
    attention_bias: Tensor | None,
    packed_seq_params: Any,
    use_inner_quantization_context: bool,
    padding_mask: Tensor | None = None,
    extract_layer_indices: set[int] | None = None,
    layer_offset: int = 0,
) -> Tensor:
    """Stands for ``megatron.core.recompute.checkpointed_forward`` while an SLA block's forward runs.

    ``hidden_states`` is ``[s, b, h]``.  The chunks are upstream's (``--recompute-method``, ``--recompute-num-layers``).
    """
    if use_inner_quantization_context or extract_layer_indices:
        raise RuntimeError("full recomputation with --sla supports neither fp8/fp4 nor the extraction of hidden states")
    layer_arguments = dict(
        attention_mask=attention_mask,
        context=context,
        context_mask=context_mask,
        rotary_pos_emb=rotary_pos_emb,
        attention_bias=attention_bias,
        inference_context=None,
        packed_seq_params=packed_seq_params,
        padding_mask=padding_mask,
    )
    for layers, is_recomputed in _chunks(self):
        if is_recomputed:
            hidden_states = _recomputed_chunk(
                layers, layer_arguments, self.config.distribute_saved_activations, hidden_states
            )
        else:
            hidden_states = _run(layers, layer_arguments, hidden_states)
    return hidden_states


def _chunks(block: TransformerBlock) -> Iterator[tuple[Sequence[Any], bool]]:
    """The block's layers as upstream groups them, and whether each group is recomputed."""
    layers, size = list(block.layers), block.config.recompute_num_layers
    if block.config.recompute_method == "uniform":
        for start in range(0, len(layers), size):
            yield layers[start : start + size], True
    elif block.config.recompute_method == "block":
        for index, layer in enumerate(layers):
            yield [layer], index < size
    else:
        raise ValueError(f"--recompute-method {block.config.recompute_method}: expected uniform or block")


def _run(layers: Sequence[Any], layer_arguments: dict[str, Any], hidden_states: Tensor) -> Tensor:
    for layer in layers:
        hidden_states, _ = layer(hidden_states=hidden_states, **layer_arguments)
    return hidden_states


def _recomputed_chunk(
    layers: Sequence[Any], layer_arguments: dict[str, Any], distribute_saved_activations: bool, hidden_states: Tensor
) -> Tensor:
    """One checkpoint: hidden states and the bundles it reads go in, hidden states and the bundles it leaves, out."""
    reads, leaves = _crossing(layers)
    kv = current()

    def chunk(hidden_states: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with microbatch() as inner:
            inner.put_all(reads, tensors)
            hidden_states = _run(layers, layer_arguments, hidden_states)
            return (hidden_states, *inner.take_all(leaves))

    hidden_states, *left = tensor_parallel.checkpoint(
        chunk, distribute_saved_activations, hidden_states, *kv.take_all(reads)
    )
    kv.put_all(leaves, left)
    return hidden_states


def _crossing(layers: Sequence[Any]) -> tuple[list[BundleName], list[BundleName]]:
    """The bundles that ``layers`` read from outside, and those that they leave to layers outside."""
    attentions = [layer.self_attention for layer in layers if isinstance(layer.self_attention, SLASelfAttention)]
    puts = [name for attention in attentions for name in attention.role.puts]
    takes = [name for attention in attentions for name in attention.role.takes]
    return [name for name in takes if name not in puts], [name for name in puts if name not in takes]


CHECKPOINTED_FORWARD = Seam(
    "megatron.core.transformer.transformer_block:checkpointed_forward",
    _checkpointed_forward,
    "full recomputation must carry shared K/V as inputs and outputs of each checkpoint; only while an SLA block runs",
    (
        "self",
        "hidden_states",
        "attention_mask",
        "context",
        "context_mask",
        "rotary_pos_emb",
        "attention_bias",
        "packed_seq_params",
        "use_inner_quantization_context",
        "padding_mask",
        "extract_layer_indices",
        "layer_offset",
    ),
)


#: Where Megatron's models are that name their block's class, as ``TransformerBlock``.
GPT_MODEL = "megatron.core.models.gpt.gpt_model"
BERT_MODEL = "megatron.core.models.bert.bert_model"


def transformer_block_seam(sla: SLAConfig, module: str = GPT_MODEL) -> Seam:
    """Have the model of ``module`` build its block, a GPT's decoder or a BERT's encoder, for ``sla``."""
    return Seam(
        f"{module}:TransformerBlock",
        partial(SLATransformerBlock, sla=sla),
        "the model names its block's class there; only while an SLA model is built",
        ("config", "spec", "post_layer_norm", "pre_process", "post_process", "pg_collection", "vp_stage"),
    )


@contextmanager
def sla_transformer_blocks(sla: SLAConfig, model: type | None = None) -> Iterator[None]:
    """Within the block, ``GPTModel(...)`` builds its decoder as an :class:`SLATransformerBlock` for ``sla``.

    Args:
        sla: what skip-layer attention means in the model.
        model: another of Megatron's models, in place of ``GPTModel``: ``BertModel``, whose attention looks both ways.

    Raises:
        SeamError: where the module of ``model`` does not name its block's class as Megatron's models do.
    """
    CHECKPOINTED_FORWARD.resolve()  # A changed upstream is found now, not in the first step.
    with replaced([transformer_block_seam(sla, GPT_MODEL if model is None else model.__module__)]):
        yield
