"""The few lines at start that say what skip-layer attention does in this run.

Megatron prints some thousand lines around them, so that they are said when the model is built, and once more right
before training starts.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.training import print_rank_0
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.models.hybrid import HybridModelConfig

from ..attention.sla_config import describe
from .parameters import pruned_parameters

_to_repeat: list[str] = []


def report_model(config: GPTModelConfig | HybridModelConfig) -> None:
    """Have the model that ``config`` builds print, on rank 0, what SLA does and how many parameters there are."""
    sla, is_hybrid = getattr(config, "sla", None), isinstance(config, HybridModelConfig)

    def hook(chunks: list[MegatronModule]) -> list[MegatronModule]:
        total = count_parameters(chunks)
        if sla is None:
            _to_repeat[:] = [f"sla-megatron: off; parameters {total}"]
        else:
            counted = f"parameters {total} (dense {total + pruned_parameters(config)})"
            _to_repeat[:] = [f"sla-megatron: {describe(sla, is_hybrid)}", f"sla-megatron: {counted}"]
        for line in _to_repeat:
            print_rank_0(line)
        return chunks

    config.pre_wrap_hooks.append(hook)


def repeat_report() -> None:
    """Print the lines of the model that was reported last once more; nothing the next time."""
    while _to_repeat:
        print_rank_0(_to_repeat.pop(0))


def count_parameters(chunks: list[MegatronModule]) -> int:
    """Parameters of the whole model, over tensor-, expert- and pipeline-parallel ranks; a collective call."""
    total = 0
    for chunk in chunks:
        for parameter in chunk.parameters():
            # Tied embeddings have a copy on the last stage: not a parameter of its own.
            if not getattr(parameter, "shared", False) or parallel_state.is_pipeline_first_stage():
                total += parameter.numel() * _shards(parameter)
    counted = torch.tensor([total], dtype=torch.long, device=torch.cuda.current_device())
    torch.distributed.all_reduce(counted, group=parallel_state.get_pipeline_model_parallel_group())
    return int(counted.item())


def _shards(parameter: torch.nn.Parameter) -> int:
    """How many ranks hold a different part of ``parameter``; 1 where each holds all of it."""
    is_expert = not getattr(parameter, "allreduce", True)
    split = getattr(parameter, "tensor_model_parallel", False)
    if is_expert:
        shards = parallel_state.get_expert_tensor_parallel_world_size() if split else 1
        return shards * parallel_state.get_expert_model_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_world_size() if split else 1
