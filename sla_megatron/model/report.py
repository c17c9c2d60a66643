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

from ..attention.sla_config import SLAConfig, compact_ranges

_to_repeat: list[str] = []


def describe(sla: SLAConfig | None, is_hybrid: bool = False) -> str:
    """What skips, from where, in which layers, as one line; of a hybrid model these are attention layers."""
    if sla is None:
        return "off"
    if sla.is_dense:
        return "no head skips with these settings: this is the standard Transformer"
    shares = {"kv": "", "values": " and share values alone", "keys": " and share keys alone"}[sla.share]
    layers = "attention layers" if is_hybrid else "layers"
    kept = "kept" if sla.kv_projection == "full" else "left out"
    what = {"kv": "K/V", "values": "V", "keys": "K"}[sla.share]
    dead = max(map(sla.num_dead, sla.shared_kinds))
    return (
        f"{sla.origin()}; {sla.num_skip_groups} of {sla.num_query_groups} K/V groups skip ({sla.pattern()}){shares}; "
        f"in {layers} {compact_ranges(sla.consumer_layers)} of {sla.num_layers}; "
        f"{dead} of {sla.num_layers * sla.num_query_groups} {what} projections are dead and {kept}"
    )


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


def pruned_parameters(config: GPTModelConfig | HybridModelConfig) -> int:
    """How many parameters ``pruned`` leaves out of the dense model: rows of K and V, their biases, unused key norms."""
    sla, transformer = config.sla, config.transformer
    if sla is None or sla.kv_projection != "pruned":
        return 0
    per_row = transformer.hidden_size + int(transformer.add_bias_linear or transformer.add_qkv_bias)
    norm = 0
    if transformer.qk_layernorm and not transformer.qk_l2_norm:
        norm = transformer.kv_channels * (2 if transformer.normalization == "LayerNorm" else 1)
    return sla.dead_parameters(transformer.kv_channels, per_row, norm)


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
