"""What the tests for GPUs run on: a GPU, or with ``SLA_TEST_DEVICE=cpu`` the CPU backend, to test them themselves."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from . import bf16
from .launch import run_worker
from .parity import relative_errors
from .runs import NO_DROPOUT, argv

DEVICE = os.environ.get("SLA_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"

IMPLEMENTATIONS = ["local"]
if ON_GPU and importlib.util.find_spec("transformer_engine"):
    IMPLEMENTATIONS.append("transformer_engine")

#: fp32, without TF32; on the CPU the sums are of the same length.
TOLERANCE = 1e-4


def prepare(monkeypatch: pytest.MonkeyPatch, gpus: int = 1) -> None:
    """For ranks on :data:`DEVICE`: skip where it has not so many; else set what they need in their environment."""
    if ON_GPU and torch.cuda.device_count() < gpus:
        pytest.skip("no CUDA GPU" if gpus == 1 else f"needs {gpus} GPUs")
    monkeypatch.setenv("SLA_TEST_DEVICE", DEVICE)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    # With this alone Megatron's fine-grained offloading leaves weights where they are.
    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", "1")
    # What Megatron's --deterministic-mode insists on.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")


def graph_requests(**flags: Any) -> dict[str, dict[str, Any]]:
    """A run of the trainer, and the same whose steps after the first are one CUDA graph, or what stands for it."""
    eager = argv(**flags, **NO_DROPOUT, no_check_for_nan_in_loss_and_grad=True)
    if not ON_GPU:
        return {"eager": {"argv": eager}, "graph": {"argv": eager, "graphs": True}}
    graph = ["--cuda-graph-impl", "full_iteration", "--cuda-graph-warmup-steps", "1"]
    return {"eager": {"argv": eager}, "graph": {"argv": [*eager, *graph]}}


@dataclass(frozen=True)
class Parity:
    """The answers of ``parity_worker``, in fp32 and in bf16, to the cases of both."""

    title: str
    fp32: dict[str, dict[str, Any]]
    bf16: dict[str, dict[str, Any]]
    answers: dict[str, dict[str, float]]

    def say(self, line: str) -> None:
        print(f"{torch.cuda.get_device_name() if ON_GPU else 'cpu'} {self.title} {line}")


def parity(
    title: str, cases: dict[str, dict[str, Any]], world_size: int, folder: Path, has_fp32: bool = True
) -> Parity:
    """Both precisions, or bf16 alone, in one group of ranks, which take longer to start than to answer."""
    in_fp32 = {f"fp32 {name}": case for name, case in cases.items() if has_fp32}
    in_bf16 = {f"bf16 {name}": case for name, case in cases.items()}
    (answers,) = run_worker("parity_worker", in_fp32 | bf16.with_dense(in_bf16), world_size, folder)
    return Parity(title, in_fp32, in_bf16, answers)


def largest_error(answer: dict[str, float]) -> float:
    """The largest of ``parity_worker``'s errors, what must hold exactly having been found to hold."""
    return max(relative_errors(answer).values())


def assert_fp32(parity: Parity) -> None:
    """Logits and every gradient are the reference's."""
    for name in parity.fp32:
        largest = largest_error(parity.answers[name])
        parity.say(f"{name}: largest {largest:.2e}")
        assert largest <= TOLERANCE, (name, parity.answers[name])


def assert_bf16(parity: Parity) -> None:
    """They are as near to it as a dense model's."""
    for name, ratios in bf16.ratios(parity.bf16, parity.answers).items():
        largest_error(parity.answers[name])
        tensor, ratio = max(ratios.items(), key=lambda each: each[1])
        parity.say(f"{name}: error / dense's at most {ratio:.2f}, {tensor}")
        assert ratio <= bf16.RATIO, (name, ratios)
