"""What ``sla_megatron`` is told, without torch or lm-eval."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...common.errors import StartError

#: Arguments of ``HFLM`` that mean here what they mean there.
OF_HFLM = (
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)


class EvaluationError(StartError):
    """What cannot be evaluated, in one line."""


@dataclass(frozen=True)
class Sizes:
    """Over how many ranks a model's parts lie; the rest of a job's ranks hold copies.

    Raises:
        EvaluationError: for what the job's ranks, or these sizes, do not allow.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        world = world_size()
        for name, size in (("tensor", self.tensor), ("pipeline", self.pipeline), ("expert", self.expert)):
            if not isinstance(size, int) or size < 1:
                raise EvaluationError(f"{name}_model_parallel_size={size}: expected an integer from 1")
        if world % (self.tensor * self.pipeline):
            raise EvaluationError(
                f"tensor_model_parallel_size={self.tensor}, pipeline_model_parallel_size={self.pipeline}: expected "
                f"sizes whose product divides the {world} ranks of this job (torchrun --nproc-per-node)"
            )
        if world // self.pipeline % (self.tensor * self.expert):
            raise EvaluationError(
                f"expert_model_parallel_size={self.expert}: expected a divisor of the "
                f"{world // (self.tensor * self.pipeline)} copies that {world} ranks have of the rest of the model"
            )


def world_size() -> int:
    """The job's, as ``torchrun`` says it; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))
