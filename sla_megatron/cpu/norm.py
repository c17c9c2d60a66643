"""LayerNorm and RMSNorm for the local spec that allow sequence parallelism.

Upstream's ``WrappedTorchNorm`` refuses it because torch's norms do not mark their parameters. With sequence
parallelism each tensor-parallel rank normalises its own slice of the sequence, so the gradients of the norm's
parameters must be summed over the tensor-parallel group; Megatron does that for every parameter marked
``sequence_parallel`` (``megatron.core.distributed.finalize_model_grads``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class _ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """Multiplies by one more than its weight (``--apply-layernorm-1p``), as Transformer Engine does."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


class _ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """The same of RMSNorm."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


_NORMS = {
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("LayerNorm", True): _ZeroCenteredLayerNorm,
    ("RMSNorm", True): _ZeroCenteredRMSNorm,
}


def torch_norm(
    cls: type,
    config: TransformerConfig,
    hidden_size: int,
    eps: float = 1e-5,
    persist_layer_norm: bool = False,
    zero_centered_gamma: bool = False,
    normalization: str = "LayerNorm",
) -> torch.nn.Module:
    """Stands for ``WrappedTorchNorm.__new__``; normalises the last dimension, of size ``hidden_size``.

    As upstream, the kind comes from ``config.normalization``, not from the unused arguments.
    Raises ``ValueError`` for another normalization, or for the variants that torch's norms do not have.
    """
    kind = _NORMS.get((config.normalization, config.layernorm_zero_centered_gamma))
    if kind is None:
        raise ValueError(f"--normalization {config.normalization}: the CPU backend has LayerNorm, RMSNorm")
    for unsupported in ("persist_layer_norm", "memory_efficient_layer_norm"):
        if getattr(config, unsupported):
            raise ValueError(f"{unsupported} is not supported by torch's norms, which the CPU backend uses")
    norm = kind(normalized_shape=hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
