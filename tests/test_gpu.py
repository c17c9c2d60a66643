"""The same claims on a CUDA GPU: local spec, and Transformer Engine with its fused attention.  ``make gpu-check``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launch import run_worker
from tests.support.runs import argv, train

pytestmark = pytest.mark.gpu

IMPLEMENTATIONS = ["local"]
if importlib.util.find_spec("transformer_engine"):
    IMPLEMENTATIONS.append("transformer_engine")

# fp32 without TF32 as on the CPU; bf16 keeps 8 bits (4e-3), over four layers and a backward pass.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    monkeypatch.setenv("SLA_TEST_DEVICE", "cuda")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    # What Megatron's --deterministic-mode insists on.
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")


def _case(**changes: Any) -> dict[str, Any]:
    case = {
        "groups": 4,
        "rope": True,
        "rms_norm": True,
        "projection": "full",
        "tp": 1,
        "sequence_parallel": False,
        "recompute": "none",
        "distances": [2],
        "skip_groups": 3,
    }
    return case | changes


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_reference(implementation: str, precision: str, tmp_path: Path) -> None:
    """Logits and every gradient against the plain-PyTorch reference, in double precision."""
    shared = {"transformer_impl": implementation, "bf16": precision == "bf16"}
    cases = {
        "full": _case(**shared),
        "pruned": _case(**shared, projection="pruned", groups=2, skip_groups=2),
        "layernorm-learned": _case(**shared, rope=False, rms_norm=False),
        "recompute-selective": _case(**shared, recompute="selective"),
        "recompute-full": _case(**shared, recompute="uniform2"),
        "two-distances": _case(**shared, distances=[2, 1]),
    }
    (answers,) = run_worker("parity_worker", cases, 1, tmp_path)
    for name, errors in answers.items():
        assert errors.pop("dead rows") == 0.0, name
        assert errors.pop("after change") > 0.0, name
        assert errors.pop("before change") == 0.0, name
        print(f"{torch.cuda.get_device_name()} {implementation} {precision} {name}: largest {max(errors.values()):.2e}")
        too_large = {tensor: error for tensor, error in errors.items() if not error <= TOLERANCE[precision]}
        assert not too_large, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_off_switch(implementation: str, tmp_path: Path) -> None:
    """Without ``--sla``, and with a distance beyond the last layer, five steps are upstream's, bit for bit."""
    flags = {"tensor_model_parallel_size": 1, "transformer_impl": implementation, "deterministic_mode": True}
    flags |= {"no_gradient_accumulation_fusion": True, "no_persist_layer_norm": True}
    requests = {
        "upstream": {"argv": argv(**flags), "entry": "upstream"},
        "off": {"argv": argv(**flags)},
        "beyond": {"argv": argv(**flags, sla=True, sla_skip_distance=4)},
        "sla": {"argv": argv(**flags, sla=True)},
    }
    runs = train(requests, 1, tmp_path)
    for name in ("off", "beyond"):
        assert runs[name]["loss"] == runs["upstream"]["loss"]
        assert runs[name]["grad_norm"] == runs["upstream"]["grad_norm"]
    assert runs["sla"]["loss"] != runs["upstream"]["loss"]
