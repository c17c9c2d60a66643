"""The layers of each virtual stage, by Megatron's own rules: even or uneven, counted embedding and loss, layouts."""

from __future__ import annotations

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

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
