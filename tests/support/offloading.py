"""Megatron's fine-grained activation offloading, on a processor too, to see what becomes of tensors that are shared.

All of it is upstream's: it groups, copies, empties and reloads.  What is changed on a processor is that it takes
tensors of a CPU for those of a GPU, pins no memory, and tells Transformer Engine nothing, which is not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

#: Fields of a ``TransformerConfig``: whatever an attention layer and a dense MLP can offload, however small.
FLAGS: dict[str, Any] = {
    "fine_grained_activation_offloading": True,
    "offload_modules": ["attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm"],
    "min_offloaded_tensor_size": 1,
}


@contextlib.contextmanager
def offloading(on_cpu: bool) -> Iterator[None]:
    """Within the block a model's activations are managed anew; nothing of it is left."""
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as upstream

    with _of_cpu_tensors() if on_cpu else contextlib.nullcontext():
        upstream.PipelineOffloadManager.reset_instance()
        try:
            yield
        finally:
            upstream.PipelineOffloadManager.OFFLOAD_MGR = None


@contextlib.contextmanager
def _of_cpu_tensors() -> Iterator[None]:
    import torch
    from megatron.core.extensions import transformer_engine
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler, OffloadTensorPool

    pinned = OffloadTensorPool.__init__

    def pageable(self: Any, device: str = "cuda", pin_memory: bool = False) -> None:
        pinned(self, device, pin_memory=False)

    def can_manage(tensor: Any) -> bool:
        return not isinstance(tensor, torch.nn.Parameter)

    with (
        mock.patch.object(transformer_engine, "cpu_offload", SimpleNamespace(CPUOffloadEnabled=False)),
        mock.patch.object(OffloadTensorPool, "__init__", pageable),
        mock.patch.object(ChunkOffloadHandler, "_can_manage_tensor_for_offload", staticmethod(can_manage)),
    ):
        yield


def next_step() -> None:
    """As a schedule does after each step, of training or evaluation; something must have been offloaded."""
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager

    manager = PipelineOffloadManager.get_instance()
    manager.reset()
    assert manager.offload_summary_total_bytes > 0
