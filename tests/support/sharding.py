"""Between a model's tensor-parallel shards and whole tensors, by parameter name.

Megatron splits along ``partition_dim``, each rank holding one contiguous part; a gated MLP's first matrix is split
within each of its two halves.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor

#: Transformer Engine keeps a norm in the linear layer that follows it; the reference has the local spec's names.
_LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def _parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name in the local spec -> parameter."""
    found = {}
    for name, parameter in model.module.named_parameters():
        for fused, local in _LOCAL_NAMES.items():
            name = name.replace(fused, local)
        found[name] = parameter
    return found


def _is_gated(model: torch.nn.Module, name: str) -> bool:
    return model.config.gated_linear_unit and ".linear_fc1." in name


def _split_dim(parameter: torch.nn.Parameter) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def full_shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    """Un-sharded shape of each parameter."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    shapes = {}
    for name, parameter in _parameters(model).items():
        shape, dim = list(parameter.shape), _split_dim(parameter)
        if dim is not None:
            shape[dim] *= size
        shapes[name] = torch.Size(shape)
    return shapes


def random_weights(shapes: dict[str, torch.Size], generator: torch.Generator) -> dict[str, Tensor]:
    """The same on all ranks.  Norms and biases are random too: at their initial 1 and 0 they would hide mistakes."""
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.3 * values if "norm" in name and name.endswith("weight") else 0.3 * values
    return weights


def load(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Give each parameter this rank's part of ``weights``."""
    size, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    for name, parameter in _parameters(model).items():
        part, dim = weights[name], _split_dim(parameter)
        if dim is not None and _is_gated(model, name):
            part = torch.cat([half.chunk(size, dim)[rank] for half in part.chunk(2, dim)], dim)
        elif dim is not None:
            part = part.chunk(size, dim)[rank]
        parameter.data.copy_(part)


def gather_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The whole gradient of each parameter, from Megatron's gradient buffers, on every rank."""
    size, group = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    gathered = {}
    for name, parameter in _parameters(model).items():
        gradient, dim = parameter.main_grad, _split_dim(parameter)
        if dim is not None and size > 1:
            parts = [torch.empty_like(gradient) for _ in range(size)]
            torch.distributed.all_gather(parts, gradient.contiguous(), group=group)
            if _is_gated(model, name):
                halves = zip(*(part.chunk(2, dim) for part in parts), strict=True)
                gradient = torch.cat([piece for half in halves for piece in half], dim)
            else:
                gradient = torch.cat(parts, dim)
        gathered[name] = gradient
    return gathered
