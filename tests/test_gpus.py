"""Tensor and pipeline parallelism under NCCL, on 2, 4 or 8 GPUs, against one GPU.  ``make gpu-check``.

With ``SLA_TEST_DEVICE=cpu`` these tests run on a processor, on gloo.  The models and what is expected are those of
``test_parity.py`` and ``test_pipeline.py``, which have many more of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import gpu
from tests.support.gpu import parity_case
from tests.support.pipelines import LAYOUTS, MODELS, Layout
from tests.support.runs import NO_DROPOUT, argv, train
from tests.test_pipeline import Runs, assert_trains_as, model_flags
from tests.test_restart import assert_restarts

pytestmark = pytest.mark.gpu

SIZES = (2, 4, 8)
#: World size -> how it is split.
SPLITS = {
    2: {name: LAYOUTS[name] for name in ("pp2", "pp2v2")},
    4: {name: LAYOUTS[name] for name in ("pp4", "pp4v2", "tp2pp2", "tp2pp2v2")},
    8: {"pp8": Layout(8, (1,) * 8), "tp2pp4": Layout(4, (2,) * 4, tensor=2)},
}
#: Two that are opposites: MHA and GQA, full and pruned, one distance and two, long and short, biases or none.
PIPELINES = ("mha-full-long", "gqa-pruned-two-short")
#: Sums in another order: NCCL's, and those of products of other shapes.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"ranks{size}")
def size(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        gpu.prepare(monkeypatch, request.param)
        yield request.param


@pytest.mark.parametrize("implementation", gpu.IMPLEMENTATIONS)
def test_tensor_parallel(size: int, implementation: str, tmp_path: Path) -> None:
    """Logits and every gradient against the reference, in fp32, and in bf16 beside a dense model's."""
    # torch's norms, which the local implementation has without Apex, do no sequence parallelism on a GPU.
    sequence_parallel = implementation == "transformer_engine" or not gpu.ON_GPU
    shared = {"transformer_impl": implementation, "tp": min(size, 4), "sequence_parallel": sequence_parallel}
    cases = {
        "full": parity_case(**shared),
        "pruned": parity_case(**shared, projection="pruned", skip_groups=4),
        "two-distances": parity_case(**shared, rope=False, distances=[2, 1]),
    }
    answers = gpu.parity(f"{implementation} TP={shared['tp']}", cases, shared["tp"], tmp_path)
    gpu.assert_fp32(answers)
    gpu.assert_bf16(answers)


@pytest.fixture(scope="module", params=gpu.IMPLEMENTATIONS)
def runs(request: pytest.FixtureRequest, size: int, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of each model on one rank, then from the same checkpoint over all ranks."""
    folder = tmp_path_factory.mktemp(f"pipelines{size}")
    found = Runs(folder)
    shared = {"transformer_impl": request.param}
    # As for tensor parallelism.
    if gpu.ON_GPU and request.param == "local":
        shared["sequence_parallel"] = False
    once = {"train_iters": 1, "eval_iters": 0, "save_interval": 1, "tensor_model_parallel_size": 1} | shared
    alone, split = {}, {}
    for model in PIPELINES:
        seed = argv(**MODELS[model].argv() | once | {"save": folder / model})
        alone[f"{model}.seed"] = {"argv": seed, "pipeline": True}
        plain = model_flags(model, folder, **shared | {"tensor_model_parallel_size": 1, "sequence_parallel": False})
        alone[f"{model}.one"] = {"argv": plain, "pipeline": True}
        for layout, its in SPLITS[size].items():
            flags = model_flags(model, folder, **its.argv() | shared)
            split |= {f"{model}.{layout}": {"argv": flags, "pipeline": True}}
    found.add(alone, 1, folder / "one")
    found.add(split, size, folder / "all")
    return found


def test_pipelines(size: int, runs: Runs) -> None:
    """Five steps, evaluations, and every gradient of the first step, are those of one GPU; nothing is left alive."""
    for model in PIPELINES:
        for layout in SPLITS[size]:
            name = f"{model}.{layout}"
            assert_trains_as(runs, name, f"{model}.one", LOSS_TOLERANCE, GRADIENT_TOLERANCE)
            for answer in runs.answers[name]:
                assert answer["alive"] == 0, name
            print(f"{gpu.DEVICE} {name}: losses {runs.figures(name)['loss']}")


@pytest.mark.parametrize("implementation", gpu.IMPLEMENTATIONS)
def test_fsdp2(size: int, implementation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's FSDP2 trains as Megatron's data parallelism does; nothing is left alive."""
    # What Megatron refuses with FSDP2, and needs with tensor parallelism.
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    shared = NO_DROPOUT | {"transformer_impl": implementation, "tensor_model_parallel_size": 1, "train_iters": 3}
    shared |= {"global_batch_size": 2 * size, "untie_embeddings_and_output_weights": True}
    shared |= {"sla": True, "sla_skip_distance": 2, "no_gradient_accumulation_fusion": True}
    requests = {}
    for projection in ("full", "pruned"):
        flags = shared | {"sla_kv_projection": projection}
        requests[f"ddp {projection}"] = {"argv": argv(**flags)}
        requests[f"fsdp {projection}"] = {"argv": argv(**flags, use_torch_fsdp2=True)}
    runs = train(requests, size, tmp_path)
    for projection in ("full", "pruned"):
        ours, theirs = runs[f"fsdp {projection}"], runs[f"ddp {projection}"]
        assert ours["status"] == theirs["status"] == 0, ours["stderr"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS_TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=GRADIENT_TOLERANCE)
        assert ours["alive"] == 0
        print(f"{gpu.DEVICE} fsdp2 {implementation} {projection} on {size}: losses {ours['loss']}")


def test_inprocess_restart(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that fails in the second step of a pipeline: all of them start again, and train as if it had not."""
    if size != 2 or not gpu.ON_GPU:
        pytest.skip("on 2 GPUs: nothing wakes a rank on gloo that waits for one that failed")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "error")
    assert_restarts(size, LAYOUTS["pp2v2"].argv(), tmp_path)
