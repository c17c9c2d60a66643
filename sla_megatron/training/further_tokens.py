"""Which stages predict further tokens (``--mtp-num-layers``), as upstream's ``pretrain_gpt.py`` finds them."""

from __future__ import annotations

from argparse import Namespace

from megatron.core.parallel_state import default_embedding_ranks
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout


def predicts_further_tokens(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this stage holds the layers that do; it embeds tokens then, and needs them with their positions."""
    if not args.mtp_num_layers:
        return False
    return mtp_on_this_rank(_layout(args), args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)


def embedding_ranks(args: Namespace, pipeline_ranks: list[int]) -> list[int]:
    """Of a pipeline's ranks, in order, those that hold the embedding's weights, to be kept equal; ascending."""
    if not args.mtp_num_layers:
        return default_embedding_ranks(pipeline_ranks)
    first, last = pipeline_ranks[0], pipeline_ranks[-1]
    # An output layer of its own is not to be mixed with embeddings.
    found = {first} if args.untie_embeddings_and_output_weights else {first, last}
    layout = _layout(args)
    if layout is None:
        return sorted(found | {last})
    stages = zip(pipeline_ranks, layout.layout, strict=True)
    return sorted(found | {rank for rank, chunks in stages if any(LayerType.mtp in chunk for chunk in chunks)})


def _layout(args: Namespace) -> PipelineParallelLayerLayout | None:
    """``--pipeline-model-parallel-layout``; upstream keeps the one that it made of a text."""
    if args.pipeline_model_parallel_layout is None:
        return None
    return PipelineParallelLayerLayout.from_str(args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size)
