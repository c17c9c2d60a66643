"""The same claims on a CUDA GPU: local spec, and Transformer Engine with its fused attention.  ``make gpu-check``.

With ``SLA_TEST_DEVICE=cpu`` these tests run on a processor, on gloo.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import gpu
from tests.support.gpu import parity_case
from tests.support.runs import CPU_FLAGS, argv, train

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def environment() -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        gpu.prepare(monkeypatch)
        yield


@pytest.fixture(scope="module", params=gpu.IMPLEMENTATIONS)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> gpu.Parity:
    """Both precisions of an implementation in one process, which takes longer to start than to answer."""
    shared = {"transformer_impl": request.param}
    cases = {
        "full": parity_case(**shared),
        "pruned": parity_case(**shared, projection="pruned", groups=2, skip_groups=2),
        "layernorm-learned": parity_case(**shared, rope=False, rms_norm=False),
        "recompute-selective": parity_case(**shared, recompute="selective"),
        "recompute-full": parity_case(**shared, recompute="uniform2"),
        "two-distances": parity_case(**shared, distances=[2, 1]),
    }
    if request.param == "transformer_engine" or not gpu.ON_GPU:
        # Upstream has it for Transformer Engine alone.
        cases["offload"] = parity_case(**shared, offload=True)
        cases["offload-two-distances"] = parity_case(**shared, offload=True, distances=[2, 1])
    return gpu.parity(request.param, cases, 1, tmp_path_factory.mktemp(request.param))


def test_reference(answers: gpu.Parity) -> None:
    """In fp32: logits and every gradient against the plain-PyTorch reference, in double precision."""
    gpu.assert_fp32(answers)


def test_bf16(answers: gpu.Parity) -> None:
    """In bf16 the same, no further from it than a dense model of the same size is in the same run."""
    gpu.assert_bf16(answers)


@pytest.mark.parametrize("implementation", gpu.IMPLEMENTATIONS)
def test_off_switch(implementation: str, tmp_path: Path) -> None:
    """Without ``--sla``, and with a distance beyond the last layer, five steps are upstream's, bit for bit."""
    flags = {"tensor_model_parallel_size": 1, "transformer_impl": implementation, "deterministic_mode": gpu.ON_GPU}
    flags |= {"no_gradient_accumulation_fusion": True, "no_persist_layer_norm": True}
    on_cpu = [] if gpu.ON_GPU else CPU_FLAGS
    requests = {
        "upstream": {"argv": [*argv(**flags), *on_cpu], "entry": "upstream"},
        "off": {"argv": argv(**flags)},
        "beyond": {"argv": argv(**flags, sla=True, sla_skip_distance=4)},
        "sla": {"argv": argv(**flags, sla=True)},
    }
    runs = train(requests, 1, tmp_path)
    for name in ("off", "beyond"):
        assert runs[name]["loss"] == runs["upstream"]["loss"]
        assert runs[name]["grad_norm"] == runs["upstream"]["grad_norm"]
    assert runs["sla"]["loss"] != runs["upstream"]["loss"]
