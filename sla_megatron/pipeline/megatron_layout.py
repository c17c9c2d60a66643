"""The layers of each virtual stage, by Megatron's own rules: even or uneven, counted embedding and loss, layouts."""

from __future__ import annotations

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from ..common.patterns import kinds, segments
from .layout import PipelineLayout


def pipeline_layout(config: TransformerConfig) -> PipelineLayout:
    """The layout that Megatron builds from ``config``.  Needs no process group.

    Raises:
        ValueError: if Megatron's stages do not hold the layers in order, which no split of a GPT does.
    """
    size, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    custom = config.pipeline_model_parallel_layout
    stages: list[tuple[int, ...]] = []
    further_stage = None
    for chunk in range(chunks or 1):
        for rank in range(size):
            vp_stage = chunk if chunks else None
            if custom is not None:
                # Upstream's functions take this from parallel_state, not from the rank that they are given.
                count = custom.layout[rank][chunk].count(LayerType.decoder)
                if LayerType.mtp in custom.layout[rank][chunk]:
                    further_stage = len(stages)
                offset = sum(map(len, stages))
            else:
                count = get_num_layers_to_build(config, vp_stage, rank)
                offset = get_transformer_layer_offset(config, vp_stage, rank)
            stages.append(tuple(range(offset + 1, offset + count + 1)))
    return PipelineLayout(size, tuple(stages), config.mtp_num_layers or 0, further_stage)


def hybrid_layout(
    pattern: str, pipeline_size: int, first: int | None = None, last: int | None = None
) -> PipelineLayout:
    """The layout that Megatron builds from a ``--hybrid-layer-pattern``; it counts layers of all kinds.

    Restates ``megatron.core.models.hybrid.hybrid_layer_allocation:select_pipeline_segment``, which needs process
    groups: with ``|`` each segment is a virtual stage, without each rank has as many layers, but for the ends.

    Args:
        pattern: the pattern; what it says of further tokens is left out.
        pipeline_size: ``P``.
        first, last: layers of the first and the last rank, where they are given
            (``--decoder-first-pipeline-num-layers``, ``--decoder-last-pipeline-num-layers``).

    Raises:
        ValueError: where the layers do not divide so.
    """
    found = segments(pattern)
    if len(found) > 1:
        if first is not None or last is not None:
            raise ValueError(f"the pattern {pattern!r} says itself which layers the first and the last stage have")
        return PipelineLayout.of_sizes(pipeline_size, map(len, found))
    given = [size for size in (first, last) if size is not None]
    middle, ranks = len(kinds(pattern)) - sum(given), pipeline_size - len(given)
    if middle < 0 or (middle % ranks if ranks else middle):
        raise ValueError(f"the {middle} layers of {pattern!r} do not divide over {ranks} pipeline ranks")
    sizes = [middle // ranks] * ranks if ranks else []
    sizes = ([first] if first is not None else []) + sizes + ([last] if last is not None else [])
    return PipelineLayout.of_sizes(pipeline_size, sizes)
