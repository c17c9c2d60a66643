"""What the dispatchers of experts ask of a process group, which gloo has for tensors of one size alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor
from torch.distributed import ProcessGroup

_UPSTREAM_GATHER = mappings._gather_along_first_dim
_UPSTREAM_REDUCE_SCATTER = mappings._reduce_scatter_along_first_dim


def already_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Stands for Megatron's ``maybe_move_tensor_to_cpu``: ``tensor``, or with ``as_numpy`` its numbers."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def gather_along_first_dim(
    input_: Tensor,
    group: ProcessGroup,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """The tensors ``[n, ...]`` of all ranks, one after the other; ranks' ``n`` are ``output_split_sizes``."""
    if output_split_sizes is None or group.size() == 1:
        return _UPSTREAM_GATHER(input_, group, None, use_global_buffer)
    padded = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    gathered = _UPSTREAM_GATHER(padded, group).split(len(padded))
    return torch.cat([piece[:size] for piece, size in zip(gathered, output_split_sizes, strict=True)])


def reduce_scatter_along_first_dim(
    input_: Tensor,
    group: ProcessGroup,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """This rank's part of the sum of all ranks' tensors, whose parts have the sizes ``input_split_sizes``."""
    if input_split_sizes is None or group.size() == 1:
        return _UPSTREAM_REDUCE_SCATTER(input_, group, None, use_global_buffer)
    whole = input_.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(whole, group=group)
    return whole.split(input_split_sizes)[group.rank()].clone()
