"""Megatron's model of a checkpoint, over all ranks, as a function of tokens: by our builder and Megatron's loading."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...common.errors import FlagError, last_line
from ...common.patterns import kinds
from ...common.silence import silence
from ...flags.asked import hybrid_pattern
from ...flags.pruned_rows import check_projection
from ...flags.sla_flags import SDPA
from ..convert.megatron_model import build
from ..convert.megatron_reader import stored_tensors
from ..convert.trained_model import PARALLELISM, PRECISION, TRAINING_ALONE, args_here, load
from .arguments import EvaluationError, Sizes
from .ranks import Ranks

#: Layers that predict further tokens: nobody asks them.
_FURTHER = ("mtp.",)

# Experts of torch, and tokens sent to them by torch: what a machine without Transformer Engine and its friends has.
_PLAIN_EXPERTS = {
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "moe_token_dispatcher_type": "alltoall",
    "moe_shared_expert_overlap": False,
}


class CheckpointModel:
    """The model of one iteration's folder.

    Args:
        folder: of the checkpoint.
        stored: the arguments in it.
        vocabulary: rows of the vocabulary that are not padding.
        ranks: over which it lies.
        sizes: how.
        dtype: that it computes in; ``None`` is fp32 on a CPU, and the checkpoint's own on a GPU.

    Raises:
        EvaluationError: where Megatron cannot build it, or the weights are not the model's; on all ranks.
    """

    def __init__(
        self,
        folder: Path,
        stored: Namespace,
        vocabulary: int,
        ranks: Ranks,
        sizes: Sizes,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.folder, self.vocabulary, self._ranks = folder, vocabulary, ranks
        if dtype is None and ranks.device == "cuda":
            dtype = torch.bfloat16 if stored.bf16 else torch.float16 if stored.fp16 else None
        self.dtype, self.sizes = dtype or torch.float32, sizes
        with ranks.megatron(), ranks.own_generators():
            with ranks.together():
                self._args = _args(stored, folder, ranks.device, sizes, self.dtype)
                self._model = _built(self._args, folder).to(ranks.torch_device)
            with ranks.together():
                load(self._model, folder, _FURTHER)

    @property
    def max_position_embeddings(self) -> int:
        """The longest text."""
        return self._args.max_position_embeddings

    @property
    def has_learned_positions(self) -> bool:
        """Whether a longer text than that is impossible, and not only untrained."""
        return self._args.position_embedding_type == "learned_absolute"

    def num_parameters(self) -> int:
        """Of the whole model as it is stored, padded rows of the vocabulary included."""
        stored = stored_tensors(self.folder).items()
        return sum(tensor.size.numel() for key, tensor in stored if not key.startswith(_FURTHER))

    @torch.no_grad()
    def logits(self, tokens: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Logits in fp32, on every rank that holds a part of the model.

        All of these call it at the same time, with the same ``tokens``; with experts over several ranks, so do all
        copies of the model.

        Args:
            tokens: ``[b, s]``; positions count from 0.
            wanted: ``[b, k]``: the tokens of each row whose logits are returned; ``None`` is all of them.

        Returns:
            ``[b, k, vocabulary]``, without padded rows.
        """
        with self._ranks.megatron():
            if self.sizes.expert == 1:
                return self._of_pipeline(tokens, wanted)
            return self._of_shared_rows(tokens, wanted)

    def _of_shared_rows(self, tokens: Tensor, wanted: Tensor | None) -> Tensor:
        """Each copy computes some of the rows: experts are asked by all copies at once, or not at all."""
        group, count = self._ranks.copies, tokens.shape[0]
        rows = -(-count // group.size())
        chosen = torch.arange(group.rank() * rows, (group.rank() + 1) * rows, device=tokens.device) % count
        mine = self._of_pipeline(tokens[chosen], None if wanted is None else wanted[chosen])
        all_rows = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(all_rows, mine, group=group)
        return torch.cat(all_rows)[:count]

    def _of_pipeline(self, tokens: Tensor, wanted: Tensor | None) -> Tensor:
        from megatron.core import parallel_state

        output = self._output(tokens)
        if output is not None:
            output = self._whole(output, wanted)
        if self.sizes.pipeline > 1:
            if output is None:
                kept = tokens if wanted is None else wanted
                output = torch.empty(*kept.shape, self.vocabulary, device=tokens.device)
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(output, last, group=parallel_state.get_pipeline_model_parallel_group())
        return output

    def _output(self, tokens: Tensor) -> Tensor | None:
        """What the last stage makes of ``tokens``, ``[b, s, rows of this rank]``; ``None`` on other stages."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        if self.sizes.pipeline == 1:
            return self._model(tokens, _positions(tokens), None)
        # So many that the stages can work at the same time, all of one size.
        count = max(n for n in range(1, self.sizes.pipeline + 1) if tokens.shape[0] % n == 0)

        def step(microbatches: Iterator[Tensor], model: Any) -> tuple[Any, Any]:
            these = next(microbatches)
            return model(these, _positions(these), None), lambda output, non_loss_data: output

        found = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(tokens.chunk(count)),
            model=self._model,
            num_microbatches=count,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0] // count,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return torch.cat(found) if found else None

    def _whole(self, output: Tensor, wanted: Tensor | None) -> Tensor:
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        if wanted is not None:
            output = output.gather(1, wanted[..., None].expand(-1, -1, output.shape[-1]))
        return gather_from_tensor_model_parallel_region(output)[..., : self.vocabulary].float().contiguous()


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def _args(stored: Namespace, folder: Path, device: str, sizes: Sizes, dtype: torch.dtype) -> Namespace:
    """The checkpoint's arguments with parallelism, precision and kernels as they are here.

    Raises :class:`FlagError` for a pruned model's rows that the tensor-parallel ranks cannot divide.
    """
    has_engine = device == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    if has_engine:
        from ...flags.fused_kernels import switch_off_missing_kernels

        args = Namespace(**{**vars(stored), **PARALLELISM, **PRECISION, **TRAINING_ALONE})
        if (pattern := hybrid_pattern(stored)) is not None:
            args.hybrid_layer_pattern = kinds(pattern)
        switch_off_missing_kernels(args)
    else:
        args = _with_torch_attention(Namespace(**{**vars(args_here(stored, folder)), **_PLAIN_EXPERTS}))
    vars(args).update(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        transformer_pipeline_model_parallel_size=sizes.pipeline,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.tensor,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=device == "cpu",
        mtp_num_layers=None,
    )
    check_projection(args)
    # The rows that the vocabulary is padded with are divided over the ranks, too; more of them change nothing.
    args.padded_vocab_size = -(-stored_tensors(folder)[_EMBEDDINGS].size[0] // sizes.tensor) * sizes.tensor
    return args


_EMBEDDINGS = "embedding.word_embeddings.weight"


def _with_torch_attention(args: Namespace) -> Namespace:
    """``args`` with torch's fused attention where the model's is one that it computes; Megatron's holds all scores."""
    from ...flags.core_attention import resolve_core_attention

    changed = Namespace(**vars(args) | {"core_attention": SDPA})
    try:
        resolve_core_attention(changed)
    except FlagError:
        return args
    return changed


def _built(args: Namespace, folder: Path) -> Any:
    try:
        with silence():
            return build(args)
    except Exception as error:
        raise EvaluationError(
            f"{folder}: Megatron's model of these arguments cannot be built here: {last_line(error)}"
        ) from error
