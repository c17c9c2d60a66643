"""What arguments ask for, where several places look at it.  Pure Python."""

from __future__ import annotations

import math
from argparse import Namespace

from ..attention.numbering import LayerNumbers
from .sla_flags import MEGATRON, SDPA

#: Flags with which samples hold several documents, or conversations, that attention is told of in place of a mask.
PACKING = ("dataloader_inter_document_masking", "sft")


def packs_documents(args: Namespace) -> bool:
    """Whether one of :data:`PACKING` is given."""
    return any(getattr(args, name) for name in PACKING)


def has_torch_attention(args: Namespace) -> bool:
    """``--core-attention sdpa``; arguments of a parser that does not know it have Megatron's."""
    return getattr(args, "core_attention", MEGATRON) == SDPA


def is_local(args: Namespace) -> bool:
    """``--transformer-impl local``."""
    return args.transformer_impl == "local"


def step_is_a_graph(args: Namespace) -> bool:
    """``--cuda-graph-impl full_iteration``."""
    return args.cuda_graph_impl == "full_iteration"


def hybrid_pattern(args: Namespace) -> str | None:
    """``--hybrid-layer-pattern``, under its older name too; ``None`` for a GPT."""
    return getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)


def layer_numbers(args: Namespace) -> LayerNumbers:
    """Which layers of the stack are attention layers: those that the pattern says, or of a GPT all."""
    pattern = hybrid_pattern(args)
    return LayerNumbers.of_gpt(args.num_layers) if pattern is None else LayerNumbers.of_pattern(pattern)


def fewest_gpus(args: Namespace) -> int:
    """The smallest world size that the parallel sizes of parsed arguments divide."""
    # Refused with --sla, in words of ours, once the world is as large as they ask for.
    shards = getattr(args, "tensor_parallel_num_weight_shards", None) or 1
    dense = math.lcm(args.tensor_model_parallel_size, shards) * args.context_parallel_size
    experts = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or args.tensor_model_parallel_size)
    return math.lcm(dense, experts) * args.pipeline_model_parallel_size
