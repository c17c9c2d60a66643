"""The kernel that mixes K/V, on the GPU that it is written for.  ``make gpu-check``."""

from __future__ import annotations

import pytest
import torch

from sla_megatron.pipeline import copy_kernel, packing
from tests.unit.attention.test_mixing import PLANS, check_all
from tests.unit.pipeline.test_packing import COPIED, SHAPES, there_and_back

pytestmark = pytest.mark.gpu


def test_against_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases that are tested interpreted, on a processor."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    launches, move = [], copy_kernel.move
    monkeypatch.setattr(copy_kernel, "move", lambda *args: launches.append(move(*args)) or launches[-1])
    assert check_all("cuda") > len(PLANS)
    assert launches and all(launches)


def test_payloads_of_several_kinds_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed and unpacked by the kernel, with their gradients."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    launches, move = [], copy_kernel.move
    monkeypatch.setattr(copy_kernel, "move", lambda *args: launches.append(move(*args)) or launches[-1])
    for shape in SHAPES:
        for copied in COPIED:
            there_and_back(packing, shape, copied, "cuda")
    assert launches and all(launches)
