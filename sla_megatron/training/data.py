"""The data side of GPT pretraining: datasets and batches, as Megatron's trainer asks for them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from .further_tokens import predicts_further_tokens

#: What a batch holds; each is [b, s] but the attention mask, [b, 1, s, s].
_BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def train_valid_test_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Megatron's GPT datasets (``--data-path`` ... or ``--mock-data``) for the three sample counts."""
    args = get_args()
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    built = BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
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
    """Whether this stage needs anything of a batch: tokens or labels at an end or where further tokens are predicted,
    a mask that tells documents apart everywhere.  Upstream reads at the former alone, and attention between them is
    then causal over all documents."""
    return args.reset_attention_mask or _needs_tokens(args, vp_stage)


def _needs_tokens(args: Namespace, vp_stage: int | None) -> bool:
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
    )


def get_batch(data_iterator: Iterator | None, vp_stage: int | None = None) -> dict[str, Tensor | None]:
    """This rank's next microbatch: read on tensor-parallel rank 0, broadcast, split over context-parallel ranks.

    Between the ends of a pipeline it is empty, but for the mask where that tells documents apart.
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
        has_cu_seqlens=False,
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
    if not needs_tokens:
        batch = dict.fromkeys(_BATCH_KEYS) | {"attention_mask": batch["attention_mask"]}
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
