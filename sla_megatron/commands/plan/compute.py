"""Floating-point operations of each virtual stage, for the simulated timeline.  Pure Python.

Legend: ``q`` sequence length, ``b`` microbatch size, ``h`` hidden size, ``H`` query heads, ``d`` head size, ``G``
projected K/V groups, ``T`` tensor-parallel and ``C`` context-parallel size.  Matrix multiplications only, two
operations for each multiply-add, attention counted as causal: what Megatron's own throughput figure counts.  Layers are
those of the stack; in a hybrid model each is of one kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ...attention.numbering import LayerNumbers
from ...attention.sla_config import KINDS, SLAConfig
from ...pipeline.layout import PipelineLayout
from ...pipeline.payload import MicrobatchShape

#: A backward pass computes gradients of inputs and of weights.
BACKWARD_OVER_FORWARD = 2


@dataclass(frozen=True)
class ModelWork:
    """What of a model decides its work, beside the sizes of a microbatch.

    Attributes:
        num_heads: ``H``.
        head_size: ``d``.
        mlp_weights: for each layer, the MLP's weights that one token meets (with experts: those of its experts).
        output_gate: whether attention has an output gate as wide as its queries.
        vocabulary: rows of the output layer, padding included; 0 where the flags do not tell.
        recompute: what a backward pass computes again: nothing, attention without its projections, or whole layers.
        recomputed_layers: of each virtual stage, how many layers ``"full"`` recomputes; ``None``: all.
        kinds: of a hybrid model each layer's symbol, as its pattern has them; of a GPT ``""``.
        mixers: symbol of a kind of layer that mixes tokens without attention -> forward operations a token.
    """

    num_heads: int
    head_size: int
    mlp_weights: tuple[int, ...]
    output_gate: bool = False
    vocabulary: int = 0
    recompute: Literal["none", "attention", "full"] = "none"
    recomputed_layers: int | None = None
    kinds: str = ""
    mixers: Mapping[str, float] = field(default_factory=dict)

    @property
    def numbers(self) -> LayerNumbers:
        """Which of the layers have attention."""
        return LayerNumbers.of_pattern(self.kinds) if self.kinds else LayerNumbers.of_gpt(len(self.mlp_weights))


def stage_operations(
    work: ModelWork, shape: MicrobatchShape, layout: PipelineLayout, sla: SLAConfig, dense: bool = False
) -> list[tuple[float, float]]:
    """(forward, backward) operations of each virtual stage for one microbatch, on one GPU.

    ``dense`` is the model without skip-layer attention, which projects the K/V of every group in every layer.
    """
    gpus = shape.tensor_parallel_size * shape.context_parallel_size
    tokens = shape.sequence_length * shape.microbatch_size
    last_stage = layout.num_stages - 1
    further_stage = last_stage if layout.further_stage is None else layout.further_stage
    further, further_again = _further_layers(work, shape, layout, sla)
    projected = {
        layer: 2 * sla.num_query_groups if dense else sum(len(sla.projected_groups(number, kind)) for kind in KINDS)
        for number, layer in enumerate(work.numbers.attention, start=1)
    }
    stages = []
    for stage, layers in enumerate(layout.stages):
        forwards = [_layer(work, shape, layer, projected.get(layer)) for layer in layers]
        forward, again = sum(forwards), 0
        if work.recompute == "full":
            again = sum(forwards[: work.recomputed_layers])
        elif work.recompute == "attention":
            again = len(projected.keys() & set(layers)) * _attention(work, shape)
        if stage == further_stage:
            forward, again = forward + further, again + further_again
        if stage == last_stage:
            forward += 2 * tokens * shape.hidden_size * work.vocabulary * (1 + layout.further_tokens)
        stages.append((forward / gpus, (BACKWARD_OVER_FORWARD * forward + again) / gpus))
    return stages


def _further_layers(work: ModelWork, shape: MicrobatchShape, layout: PipelineLayout, sla: SLAConfig) -> tuple[int, int]:
    """Operations of the layers that predict further tokens, forward and again: each is as the last layer without skip
    heads, behind a matrix that joins the hidden state and the embedding of the next token."""
    joining = 2 * shape.sequence_length * shape.microbatch_size * 2 * shape.hidden_size**2
    one = _layer(work, shape, layout.num_layers, 2 * sla.num_query_groups) + joining if layout.further_tokens else 0
    again = {"none": 0, "attention": _attention(work, shape), "full": one}[work.recompute]
    return layout.further_tokens * one, layout.further_tokens * again


def _layer(work: ModelWork, shape: MicrobatchShape, layer: int, projected: int | None) -> float:
    """Forward operations of one layer for one microbatch, over all of its GPUs; no attention where ``projected``,
    its heads of keys and of values together, is ``None``."""
    tokens = shape.sequence_length * shape.microbatch_size
    mixing = work.mixers.get(work.kinds[layer - 1], 0) if work.kinds else 0
    others = tokens * (2 * work.mlp_weights[layer - 1] + mixing)
    if projected is None:
        return others
    # Query (its gate beside it) and output projections, key and value projections.
    heads = work.num_heads * (2 + work.output_gate) + projected
    return others + 2 * tokens * shape.hidden_size * work.head_size * heads + _attention(work, shape)


def _attention(work: ModelWork, shape: MicrobatchShape) -> int:
    """Scores and weighted values of one layer; ``q * q / 2`` pairs of positions, since attention is causal."""
    return 2 * shape.microbatch_size * shape.sequence_length**2 * work.num_heads * work.head_size
