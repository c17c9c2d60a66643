"""The same claims on a CUDA GPU: local spec, and Transformer Engine with its fused attention.  ``make gpu-check``.

With ``SLA_TEST_DEVICE=cpu`` these tests run on a processor, on gloo.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import gpu
from tests.support.parity import FROM_ONE, parity_case
from tests.support.runs import CLOSE, CPU_FLAGS, NO_DROPOUT, argv, train

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
        "values-from-one": parity_case(**shared, **FROM_ONE, projection="pruned"),
        "values-from-one-recompute-full": parity_case(**shared, **FROM_ONE, recompute="uniform2"),
        "two-distances": parity_case(**shared, distances=[2, 1]),
        "hybrid": parity_case(**shared, pattern="*-**-", distances=[2, 1]),
        "hybrid-recompute-full": parity_case(**shared, pattern="-*-**", recompute="uniform3", projection="pruned"),
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
def test_documents_in_one_sample(implementation: str, tmp_path: Path) -> None:
    """Each document as it is alone: with torch's attention, and in bf16 with Transformer Engine's of packed samples."""
    is_torch = implementation == "local"
    shared = {"transformer_impl": implementation, "documents": [[0, 3, 8, 9], [0, 11]]}
    shared |= {"core_attention": "sdpa"} if is_torch else {"packed": "thd"}
    cases = {"full": parity_case(**shared), "learned": parity_case(**shared, rope=False, projection="pruned")}
    answers = gpu.parity(f"{implementation} documents", cases, 1, tmp_path, has_fp32=is_torch)
    gpu.assert_fp32(answers)
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
    # Layers that predict further tokens are upstream's behind a skip-layer model too.
    further = flags | {"position_embedding_type": "rope", "mtp_num_layers": 2}
    requests |= {
        "further.upstream": {"argv": [*argv(**further), *on_cpu], "entry": "upstream"},
        "further.beyond": {"argv": argv(**further, sla=True, sla_skip_distance=4)},
    }
    runs = train(requests, 1, tmp_path)
    for name, as_in in (("off", "upstream"), ("beyond", "upstream"), ("further.beyond", "further.upstream")):
        assert runs[name]["loss"] == runs[as_in]["loss"]
        assert runs[name]["grad_norm"] == runs[as_in]["grad_norm"]
    assert runs["sla"]["loss"] != runs["upstream"]["loss"]


@pytest.mark.parametrize("implementation", gpu.IMPLEMENTATIONS)
def test_a_step_as_a_cuda_graph(implementation: str, tmp_path: Path) -> None:
    """Captured in the second step, replayed in three others: losses and gradient norms are those of the run without."""
    flags = {"tensor_model_parallel_size": 1, "transformer_impl": implementation, "sla": True, "sla_skip_distance": 2}
    flags |= {"no_gradient_accumulation_fusion": True, "no_persist_layer_norm": True, "deterministic_mode": gpu.ON_GPU}
    runs = train(gpu.graph_requests(**flags), 1, tmp_path)
    assert runs["graph"]["status"] == runs["eager"]["status"] == 0, runs["graph"]["stderr"]
    for what in ("loss", "grad_norm", "evaluations"):
        assert runs["graph"][what] == pytest.approx(runs["eager"][what], rel=CLOSE)
    assert len(set(runs["eager"]["loss"])) == 5


@pytest.mark.skipif("transformer_engine" not in gpu.IMPLEMENTATIONS, reason="no Transformer Engine")
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_full_recomputation_in_fp8(recipe: str, tmp_path: Path) -> None:
    """Losses and gradient norms as without recomputation, for all layers and for some; and fp8 is not bf16."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    shared = {"tensor_model_parallel_size": 1, "transformer_impl": "transformer_engine", "bf16": True, "sla": True}
    shared |= {
        "sla_skip_distance": 2,
        "no_gradient_accumulation_fusion": True,
        "deterministic_mode": True,
        **NO_DROPOUT,
    }
    fp8 = shared | {"fp8_format": "hybrid", "fp8_recipe": recipe}
    full = {"recompute_granularity": "full", "recompute_num_layers": 2}
    requests = {
        "bf16": {"argv": argv(**shared)},
        "fp8": {"argv": argv(**fp8)},
        "uniform": {"argv": argv(**fp8, **full, recompute_method="uniform")},
        "block": {"argv": argv(**fp8, **full, recompute_method="block")},
    }
    runs = train(requests, 1, tmp_path)
    assert {name: run["status"] for name, run in runs.items()} == dict.fromkeys(requests, 0)
    for name in ("uniform", "block"):
        for what in ("loss", "grad_norm"):
            assert runs[name][what] == pytest.approx(runs["fp8"][what], rel=1e-3)
    assert runs["fp8"]["loss"] != runs["bf16"]["loss"]


@pytest.mark.skipif(gpu.ON_GPU and not find_spec("mamba_ssm"), reason="no mamba_ssm")
@pytest.mark.skipif(gpu.ON_GPU and "transformer_engine" not in gpu.IMPLEMENTATIONS, reason="no Transformer Engine")
def test_hybrid_with_mamba(tmp_path: Path) -> None:
    """Mamba layers pass K/V by: where no head skips it is upstream's run, and recomputation changes nothing.

    Mamba's backward kernels add in no fixed order, so that the first loss alone is the same to the bit.  On the CPU,
    which has none of them, the pattern has none, and upstream no hybrid model either.
    """
    flags = {"tensor_model_parallel_size": 1, "num_layers": None, "transformer_impl": gpu.IMPLEMENTATIONS[-1]}
    flags |= {"no_gradient_accumulation_fusion": True, "no_persist_layer_norm": True, **NO_DROPOUT}
    pattern = "M*-M*-" if gpu.ON_GPU else "*-*-"
    flags |= {f"hybrid_layer_pattern={pattern}": True}
    flags |= {"mamba_head_dim": 16, "mamba_state_dim": 16, "mamba_num_groups": 1}
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3}
    requests = {
        "off": {"argv": argv(**flags)},
        "beyond": {"argv": argv(**flags, sla=True, sla_skip_distance=2)},
        "sla": {"argv": argv(**flags, sla=True, sla_skip_distance=1)},
        "uniform": {"argv": argv(**flags, **full, sla=True, sla_skip_distance=1)},
    }
    if gpu.ON_GPU:
        requests["upstream"] = {"argv": argv(**flags), "entry": "upstream"}
    runs = train(requests, 1, tmp_path)
    assert {name: run["status"] for name, run in runs.items()} == dict.fromkeys(requests, 0)
    pairs = [("beyond", "off"), ("uniform", "sla")] + ([("off", "upstream")] if gpu.ON_GPU else [])
    for name, as_in in pairs:
        assert runs[name]["loss"][0] == runs[as_in]["loss"][0]
        for what in ("loss", "grad_norm"):
            assert runs[name][what] == pytest.approx(runs[as_in][what], rel=1e-4), (name, what)
    assert runs["sla"]["loss"] != pytest.approx(runs["off"]["loss"], rel=1e-4)
