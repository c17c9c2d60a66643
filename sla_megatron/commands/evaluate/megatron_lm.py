"""``--model sla_megatron``: lm-eval's own ``HFLM`` on a Megatron checkpoint as it is.

What lm-eval makes of texts, windows, prefixes, batches and stop words is therefore what it is with ``--model hf`` on
the export; the logits are Megatron's.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..convert.checkpoint_arguments import stored_args
from ..convert.commands import DTYPES
from ..convert.megatron_reader import checkpoint_folder
from .arguments import OF_HFLM, EvaluationError, Sizes, world_size
from .causal_lm import MegatronCausalLM
from .checkpoint_model import CheckpointModel
from .ranks import Ranks
from .text import tokenizer_of

_DTYPES = {**DTYPES, **{str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}}


@register_model("sla_megatron")
class SLAMegatronLM(HFLM):
    """A checkpoint of Megatron's trainer, with ``--sla``, dense or hybrid, over all ranks of a job.

    Args:
        pretrained: the ``--save`` folder, or one ``iter_*`` of it; ``load`` is another name for it.
        ckpt_step: the iteration, if it is not the last.
        tokenizer: a folder or a name of the Hub, in place of the checkpoint's tokenizer.
        tokenizer_model: where the checkpoint's own tokenizer is now, if it has moved.
        tensor_model_parallel_size, pipeline_model_parallel_size, expert_model_parallel_size: of the model here,
            whatever they were in training; further ranks of the job are copies, that share the documents.
        devices: the job's ranks, as lm-eval's ``megatron_lm`` has it told; compared with their number.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by itself fp32 on a CPU, and the checkpoint's on a GPU.
        device: ``cpu`` or ``cuda``.
        max_length: of a text, in tokens; by itself the checkpoint's ``--max-position-embeddings``.
        max_gen_toks: tokens that are generated where a task says nothing.
        trust_remote_code: whether code in ``tokenizer`` may run.
        others: those in :data:`OF_HFLM`.

    Raises:
        StartError: in one line, on all ranks, for what cannot be evaluated.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        load: str | None = None,
        ckpt_step: int | None = None,
        tokenizer: str | None = None,
        tokenizer_model: str | None = None,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        devices: int | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        sizes = Sizes(tensor_model_parallel_size, pipeline_model_parallel_size, expert_model_parallel_size)
        _check_others(others, sizes)
        if devices not in (None, world_size()):
            raise EvaluationError(f"devices={devices}: expected {world_size()}, the ranks of this job")
        for name, number in (("max_length", max_length), ("max_gen_toks", max_gen_toks)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise EvaluationError(f"{name}={number}: expected an integer from 1")
        kind = _dtype(dtype)
        folder = _folder(pretrained, load, ckpt_step)
        stored = stored_args(folder)
        text, vocabulary = tokenizer_of(stored, folder, tokenizer, tokenizer_model, trust_remote_code)
        self._ranks = Ranks(device, sizes)
        #: Ends the process groups, after which the model cannot be used; done by itself when nobody holds the model.
        self.close = weakref.finalize(self, self._ranks.close)
        checkpoint = CheckpointModel(folder, stored, vocabulary, self._ranks, sizes, kind)
        _check_length(max_length, checkpoint)
        with _quiet("lm_eval.models.huggingface"):
            super().__init__(
                MegatronCausalLM(checkpoint, self._ranks.torch_device),
                backend="causal",
                tokenizer=text,
                max_length=max_length,
                **others,
            )
        self._max_gen_toks, self._folder = max_gen_toks, folder
        if sizes.expert == 1:
            self._rank, self._world_size = self._ranks.copies.rank(), self._ranks.copies.size()
        # lm-eval's first copy writes results where LOCAL_RANK is 0; over several nodes, each has such a rank.
        if "LOCAL_RANK" in os.environ:
            os.environ["LOCAL_RANK"] = os.environ["RANK"]

    @property
    def max_gen_toks(self) -> int:
        """Of a task that says nothing."""
        return self._max_gen_toks

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval records."""
        return {
            "model_num_parameters": self._model.num_parameters(),
            "model_dtype": self._model.dtype,
            "model_revision": self._folder.name,
        }

    # What lm-eval gathers of the copies.

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """One number of each copy, as a vector."""
        if self.world_size == 1:
            return tensor
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(found, tensor, group=self._ranks.copies)
        return torch.stack(found).flatten()

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What each copy has, on copy ``dst``."""
        found = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, found, group=self._ranks.copies, group_dst=dst)
        return found

    def barrier(self) -> None:
        """Until all copies are here."""
        dist.barrier(group=self._ranks.copies)


def _folder(pretrained: str | None, load: str | None, step: int | None) -> Path:
    if (pretrained is None) == (load is None):
        raise EvaluationError("model_args: expected a checkpoint's folder, pretrained=PATH (or load=PATH)")
    path = Path(os.path.abspath(pretrained or load))
    if not path.is_dir():
        raise EvaluationError(f"{path}: no such checkpoint folder")
    if step is not None:
        if not isinstance(step, int) or step < 0:
            raise EvaluationError(f"ckpt_step={step}: expected an iteration")
        path = path / f"iter_{step:07d}"
    return checkpoint_folder(path)


def _check_others(others: dict[str, Any], sizes: Sizes) -> None:
    unknown = sorted(set(others) - set(OF_HFLM))
    if unknown:
        raise EvaluationError(
            f"model_args {unknown[0]}: sla_megatron has no such argument; sla-eval --help lists those that it has"
        )
    is_alone = sizes == Sizes()
    if str(others.get("batch_size", 1)).startswith("auto") and not is_alone:
        raise EvaluationError("--batch_size auto: expected a number for a model over several ranks")


def _check_length(length: int | None, checkpoint: CheckpointModel) -> None:
    most = checkpoint.max_position_embeddings
    if length is not None and length > most and checkpoint.has_learned_positions:
        raise EvaluationError(f"max_length={length}: expected at most {most}, for which the checkpoint has positions")


def _dtype(name: str | torch.dtype) -> torch.dtype | None:
    if name == "auto" or isinstance(name, torch.dtype):
        return None if name == "auto" else name
    if name not in _DTYPES:
        raise EvaluationError(f"dtype={name}: expected auto or one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """HFLM warns that a model which is no path may be used in one process alone; here it is not."""
    logger = logging.getLogger(name)
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False
