"""Fused CUDA kernels that Megatron uses by default and that are not installed: Apex's, and Transformer Engine's.

Upstream looks for them when it imports itself, and its layers refuse to be built, or to run, where a default asks for
what was not found.  None of them changes what is computed.
"""

from __future__ import annotations

import importlib.util
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from ..upstream.seams import Reliance
from .asked import has_torch_attention, is_local

FUSED_GRADIENTS = Reliance(
    "megatron.core.tensor_parallel.layers:_grad_accum_fusion_available",
    "ColumnParallelLinear, every GPT's output layer, refuses --gradient-accumulation-fusion, a default, without it",
)
APEX = Reliance(
    "megatron.core.models.backends:HAVE_APEX",
    "without it local layers have torch's norms, which refuse persistent ones, a default",
)
FUSED_ROTARY = Reliance(
    "megatron.core.models.common.embeddings.rope_utils:fused_apply_rotary_pos_emb",
    "TransformerConfig refuses fused rotary embeddings, a default, without it",
)


@dataclass(frozen=True)
class _Kernel:
    """A default that needs a kernel: argument, its value without the kernel, and whether these arguments lack it."""

    argument: str
    off: bool
    is_missing: Callable[[Namespace], bool]


def _found(by: Reliance) -> bool:
    owner, name = by.resolve()
    return bool(getattr(owner, name))


def _lacks_norm(args: Namespace) -> bool:
    # Apex has no persistent RMSNorm: local layers have torch's with it too.
    return is_local(args) and (args.normalization == "RMSNorm" or not _found(APEX))


def _lacks_softmax(args: Namespace) -> bool:
    # Imported by the first forward pass alone.
    is_used = is_local(args) and not has_torch_attention(args)
    return is_used and importlib.util.find_spec("scaled_masked_softmax_cuda") is None


def _lacks_rotary(args: Namespace) -> bool:
    is_rotary = args.position_embedding_type == "rope" or args.use_rotary_position_embeddings
    return is_rotary and not args.multi_latent_attention and not _found(FUSED_ROTARY)


_KERNELS = (
    _Kernel("gradient_accumulation_fusion", False, lambda args: not _found(FUSED_GRADIENTS)),
    _Kernel("no_persist_layer_norm", True, _lacks_norm),
    _Kernel("masked_softmax_fusion", False, _lacks_softmax),
    _Kernel("apply_rope_fusion", False, _lacks_rotary),
)


def switch_off_missing_kernels(args: Namespace) -> None:
    """Switch off, in place, what asks for a kernel that is missing, and say so in one line; before validation.

    With ``--sla`` and without, so that a dense run next to it has the same flags.

    Raises:
        SeamError: if upstream no longer says what it found.
    """
    missing = [
        kernel for kernel in _KERNELS if getattr(args, kernel.argument) != kernel.off and kernel.is_missing(args)
    ]
    changed = {kernel.argument: kernel.off for kernel in missing}
    vars(args).update(changed)
    if changed and os.environ.get("RANK", "0") == "0":
        listed = ", ".join(f"{name}={value}" for name, value in changed.items())
        print(f"sla-megatron: fused kernels of Apex or Transformer Engine are missing: {listed}", flush=True)
