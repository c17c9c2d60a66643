"""LayerNorm and RMSNorm for the local spec that allow sequence parallelism.

Upstream's ``WrappedTorchNorm`` refuses it because torch's norms do not mark their parameters. With sequence
parallelism each tensor-parallel rank normalises its own slice of the sequence, so the gradients of the norm's
parameters must be summed over the tensor-parallel group; Megatron does that for every parameter marked
``sequence_parallel`` (``megatron.core.distributed.finalize_model_grads``).
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


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
    if config.normalization not in _NORMS:
        raise ValueError(f"--normalization {config.normalization}: the CPU backend has {', '.join(_NORMS)}")
    for unsupported in ("layernorm_zero_centered_gamma", "persist_layer_norm", "memory_efficient_layer_norm"):
        if getattr(config, unsupported):
            raise ValueError(f"{unsupported} is not supported by torch's norms, which the CPU backend uses")
    norm = _NORMS[config.normalization](normalized_shape=hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
