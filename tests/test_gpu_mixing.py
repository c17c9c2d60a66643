"""The kernel that mixes K/V, on the GPU that it is written for.  ``make gpu-check``."""

from __future__ import annotations

import pytest
import torch

from sla_megatron.pipeline import copy_kernel
from tests.unit.attention.test_mixing import PLANS, check_all

pytestmark = pytest.mark.gpu


def test_against_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases that are tested interpreted, on a processor."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    launches, move = [], copy_kernel.move
    monkeypatch.setattr(copy_kernel, "move", lambda *args: launches.append(move(*args)) or launches[-1])
    assert check_all("cuda") > len(PLANS)
    assert launches and all(launches)
