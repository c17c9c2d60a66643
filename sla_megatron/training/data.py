"""The data side of GPT pretraining: datasets and batches, as Megatron's trainer asks for them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, print_rank_0
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from ..flags.asked import has_torch_attention, packs_documents
from .further_tokens import predicts_further_tokens

#: What attention reads of a batch: a mask [b, 1, s, s]; or where documents start in the samples, [b, s + 1], and the
#: longest one's length.
_FOR_ATTENTION = ("attention_mask", "cu_seqlens", "cu_seqlens_padded", "max_seqlen")
#: All that a batch holds; the others are [b, s].
_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", *_FOR_ATTENTION)


def train_valid_test_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Megatron's datasets (``--data-path`` ... or ``--mock-data``) for the three sample counts: of text, or with
    ``--sft`` of conversations."""
    args = get_args()
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    built = BlendedMegatronDatasetBuilder(
        SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        # Tensor-parallel rank 0 broadcasts to the others.
        lambda: parallel_state.get_tensor_model_parallel_rank() == 0 and _reads_batches(args, vp_stage),
        _dataset_config(args),
    ).build()
    print_rank_0("> finished creating GPT datasets ...")
    return built


# Megatron's trainer calls the provider on every rank, not on tensor-parallel rank 0 alone.
train_valid_test_datasets.is_distributed = True


def _reads_batches(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this stage needs anything of a batch: what :func:`_needs_tokens` says; everywhere, what tells documents
    apart.

    With ``--reset-attention-mask`` upstream reads where tokens are needed alone, and attention elsewhere is then causal
    over all documents.
    """
    return args.reset_attention_mask or packs_documents(args) or _needs_tokens(args, vp_stage)


def _needs_tokens(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this stage needs tokens or labels: at an end of the pipeline, or where further tokens are predicted."""
    return is_first_or_last_pipeline_stage(vp_stage) or predicts_further_tokens(args, vp_stage)


def _dataset_config(args: Namespace) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def get_batch(data_iterator: Iterator | None, vp_stage: int | None = None) -> dict[str, Tensor | None]:
    """This rank's next microbatch: read on tensor-parallel rank 0, broadcast, split over context-parallel ranks.

    Between the ends of a pipeline it is empty, but for what tells documents apart.
    """
    args = get_args()
    if not _reads_batches(args, vp_stage):
        return dict.fromkeys(_BATCH_KEYS)
    needs_tokens = _needs_tokens(args, vp_stage)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Tensor | None] = {}
    if tp_rank == 0:
        read = next(data_iterator)
        batch = {key: None if read.get(key) is None else read[key].cuda(non_blocking=True) for key in _BATCH_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packs_documents(args),
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts_further_tokens(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        # Between the ends upstream would broadcast nothing, the mask neither.
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage() or not needs_tokens,
    )
    if packs_documents(args):
        batch = _documents_together(batch, has_torch_attention(args))
    if not needs_tokens:
        batch = dict.fromkeys(_BATCH_KEYS) | {key: batch[key] for key in _FOR_ATTENTION}
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
        # As without documents: chunks of the sequence, wherever they end.  Conversations are padded for Transformer
        # Engine, which wants chunks of each.
        use_per_sequence_balancing=not args.sft or has_torch_attention(args),
    )


def _documents_together(batch: dict[str, Tensor | None], stay_samples: bool) -> dict[str, Tensor | None]:
    """``batch`` with documents counted over all samples, ``cu_seqlens`` ``[1, documents + 1]``.

    Unless they ``stay_samples``, samples are put one after the other too, each tensor ``[1, b * s]``, as Transformer
    Engine wants them.
    """
    together = flatten_batch_for_packed_sequences(dict(batch))
    return batch | {key: together[key] for key in _FOR_ATTENTION} if stay_samples else together


def packed_sequences(batch: dict[str, Tensor | None]) -> PackedSeqParams | None:
    """What attention is told of documents; ``None`` without ``--dataloader-inter-document-masking`` and ``--sft``.

    To torch's attention samples stay samples, ``[s, b, h]``, so that a pipeline's stages exchange what they always do;
    rotary embedding then counts positions from the start of the sample, which is as good: it looks at distances.
    """
    args, cu_seqlens = get_args(), batch["cu_seqlens"]
    if cu_seqlens is None:
        return None
    documents = cu_seqlens.squeeze(0)
    update_seqlen_stats_from_cu_seqlens(documents)
    if has_torch_attention(args):
        longest, layout = args.seq_length, {"qkv_format": "sbhd"}
    else:
        longest, layout = int(batch["max_seqlen"].item()), {"qkv_format": "thd", "tokens_per_sample": args.seq_length}
    return PackedSeqParams(
        cu_seqlens_q=documents, cu_seqlens_kv=documents, max_seqlen_q=longest, max_seqlen_kv=longest, **layout
    )
