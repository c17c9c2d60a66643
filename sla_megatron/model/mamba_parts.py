"""Mamba layers that can be built where Mamba's kernels are not: to be counted, converted or looked at, not to be run.

Upstream's mixer raises in its constructor without the packages ``mamba_ssm`` and ``einops``, of which it uses nothing
there but a norm.  While a model with such layers is built without them, what it finds in their place is this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.ssm import mamba_mixer
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from ..common.patterns import MAMBA, kinds
from ..upstream.seams import Seam, replaced

_MIXER = "megatron.core.ssm.mamba_mixer"
_REASON = "a model with Mamba layers is built where the package is missing; they cannot be run"


class GatedNormThatIsNotRun(torch.nn.Module):
    """The parameter of ``mamba_ssm``'s gated RMSNorm, ``[hidden_size]``, and how upstream stores it."""

    def __init__(self, hidden_size: int, *, device: Any = None, dtype: Any = None, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As upstream's: split over tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


MAMBA_PARTS = (
    Seam(f"{_MIXER}:HAVE_MAMBA_SSM", _REASON, stand_in=True),
    Seam(f"{_MIXER}:HAVE_EINOPS", _REASON, stand_in=True),
    Seam("megatron.core.ssm.mamba_context_parallel:HAVE_EINOPS", _REASON, stand_in=True),
    Seam(f"{_MIXER}:ExtendedRMSNorm", _REASON, stand_in=GatedNormThatIsNotRun),
)


def built_with_mamba(pattern: str, build: Callable[[], MegatronModule]) -> MegatronModule:
    """The model of ``build()``, whose Mamba layers, where their kernels are not, raise ``RuntimeError`` when run."""
    is_missing = not (mamba_mixer.HAVE_MAMBA_SSM and mamba_mixer.HAVE_EINOPS)
    if MAMBA not in kinds(pattern) or not is_missing:
        return build()
    with replaced(MAMBA_PARTS):
        model = build()
    for module in model.modules():
        if isinstance(module, mamba_mixer.MambaMixer):
            module.register_forward_pre_hook(_refuse_to_run)
    return model


def _refuse_to_run(*_: Any) -> None:
    raise RuntimeError("Mamba layers run where the packages mamba_ssm, causal_conv1d and einops are")
