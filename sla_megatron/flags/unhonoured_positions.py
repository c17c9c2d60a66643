"""Of the flags in ``unhonoured.py`` those of positions, and of documents that share a sample."""

from __future__ import annotations

from argparse import Namespace

from ..common.errors import OFF
from . import rope_scaling
from .asked import PACKING, has_torch_attention, hybrid_pattern, packs_documents, step_is_a_graph
from .rows import Row

_NEEDS_ROPE = "--position-embedding-type rope beside it"


def _positions(args: Namespace) -> str:
    return "rope" if args.use_rotary_position_embeddings else args.position_embedding_type


def _not_rotary(args: Namespace) -> bool:
    return _positions(args) not in ("rope", "yarn", "mrope") and not args.multi_latent_attention


def _not_yarn(args: Namespace) -> bool:
    return _positions(args) != "yarn" and not args.multi_latent_attention


def _attention_of_te(args: Namespace) -> bool:
    names_local = getattr(args.attention_backend, "name", None) == "local"
    # With experts, or in a hybrid model, Megatron builds no local attention for it.
    names_local = names_local and not args.num_experts and hybrid_pattern(args) is None
    return args.transformer_impl == "transformer_engine" and not names_local


def _fused_softmax(args: Namespace) -> bool:
    """Whether the kernel that makes its own mask may stand in for Megatron's local attention."""
    return (args.bf16 or args.fp16) and args.masked_softmax_fusion and not has_torch_attention(args)


POSITIONS = (
    *(
        Row(name, fine, "--position-embedding-type yarn beside it, or --rope-scaling-factor", _not_yarn)
        for name, fine in (
            ("rotary_scaling_factor", (1.0,)),
            ("mscale", (1.0,)),
            ("mscale_all_dim", (0.0,)),
            ("yarn_original_max_position_embeddings", (None,)),
            ("yarn_beta_fast", (None,)),
            ("yarn_beta_slow", (None,)),
        )
    ),
    Row("rotary_base", (10000,), _NEEDS_ROPE, _not_rotary),
    Row("rotary_percent", (1.0,), _NEEDS_ROPE, _not_rotary),
    Row("rotary_interleaved", OFF, _NEEDS_ROPE, _not_rotary),
    Row("rotary_seq_len_interpolation_factor", OFF, _NEEDS_ROPE, _not_rotary),
    Row("use_rope_scaling", OFF, _NEEDS_ROPE, lambda args: _positions(args) != "rope"),
    Row(
        "rope_scaling_factor",
        (rope_scaling.UPSTREAMS,),
        "--use-rope-scaling beside it",
        lambda args: not args.use_rope_scaling,
    ),
    Row(
        "reset_position_ids",
        OFF,
        "--reset-attention-mask beside it: only learned positions look at position ids",
        lambda args: _positions(args) != "learned_absolute" and not args.reset_attention_mask,
    ),
    Row(
        "reset_attention_mask",
        OFF,
        "--transformer-impl local: Transformer Engine's attention is causal over all documents",
        _attention_of_te,
    ),
    Row(
        "reset_attention_mask",
        OFF,
        "--no-masked-softmax-fusion beside it: the fused kernel makes a mask of its own",
        _fused_softmax,
    ),
    Row(
        "reset_attention_mask",
        OFF,
        "no --window-size beside it: it makes a mask of its own",
        lambda args: args.window_size,
    ),
    Row(
        "reset_attention_mask",
        OFF,
        "no --no-create-attention-mask-in-dataloader beside it",
        lambda args: not args.create_attention_mask_in_dataloader,
    ),
)

#: Documents in one sample, and conversations.
DOCUMENTS = (
    *(
        Row(name, OFF, "no such flag beside --dataloader-inter-document-masking or --sft: these do it", packs_documents)
        for name in ("reset_attention_mask", "reset_position_ids")
    ),
    *(
        Row(
            name,
            OFF,
            "--micro-batch-size 1 or --core-attention sdpa beside it with a pipeline: for Transformer Engine samples "
            "are put one after the other, and stages expect them side by side",
            lambda args: (
                args.micro_batch_size != 1 and args.pipeline_model_parallel_size > 1 and not has_torch_attention(args)
            ),
        )
        for name in PACKING
    ),
    Row(
        "dataloader_inter_document_masking",
        OFF,
        "--core-attention sdpa beside it with context parallelism: Transformer Engine takes each document to be split "
        "over the ranks, Megatron splits the sequence",
        lambda args: args.context_parallel_size > 1 and not has_torch_attention(args),
    ),
    *(
        Row(name, OFF, "no --cuda-graph-impl full_iteration: documents end elsewhere in each step", step_is_a_graph)
        for name in PACKING
    ),
    Row("sft", OFF, "--tokenizer-type SFTTokenizer beside it", lambda args: args.tokenizer_type != "SFTTokenizer"),
    Row("sft", OFF, "--data-path FILE.jsonl beside it, no --mock-data", lambda args: args.mock_data),
    Row(
        "sft",
        OFF,
        "--no-create-attention-mask-in-dataloader or --core-attention sdpa beside it",
        lambda args: args.create_attention_mask_in_dataloader and not has_torch_attention(args),
    ),
    Row(
        "mtp_num_layers",
        OFF,
        "no --mtp-num-layers with documents in one sample and --core-attention sdpa: Megatron moves tokens on over "
        "documents' ends",
        lambda args: packs_documents(args) and has_torch_attention(args),
    ),
)
