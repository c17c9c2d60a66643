"""Tensor and pipeline parallelism under NCCL, on 2, 4 or 8 GPUs, against one GPU.  ``make gpu-check``.

With ``SLA_TEST_DEVICE=cpu`` these tests run on a processor, on gloo.  The models and what is expected are those of
``test_parity.py`` and ``test_pipeline.py``, which have many more of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import gpu
from tests.support.parity import parity_case
from tests.support.pipelines import LAYOUTS, MODELS, Layout
from tests.support.runs import NO_DROPOUT, argv, figures, train, train_on_all_ranks
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
#: bf16 has 8 bits; sums in another order differ in the last.
BF16_TOLERANCE = 1e-2
EXPERTS = {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_token_dispatcher_type": "alltoall"}
EXPERTS |= {"swiglu": True, "disable_bias_linear": True, "bf16": True, "tensor_model_parallel_size": 1}
EXPERTS |= {"num_layers": 8, "sla": True, "sla_skip_distance": [2, 6], "no_gradient_accumulation_fusion": True}


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


#: How Transformer Engine's attention gets at the other ranks' keys and values.
EXCHANGES: dict[str, dict[str, Any]] = {"p2p": {}, "a2a": {}, "all_gather": {}, "a2a+p2p": {"hierarchy": [2, 2]}}


@pytest.mark.parametrize("implementation", gpu.IMPLEMENTATIONS)
def test_context_parallel(size: int, implementation: str, tmp_path: Path) -> None:
    """The same with the sequence split: torch's attention; and Transformer Engine's, which does so in bf16 alone."""
    context, is_torch = min(size, 4), implementation == "local"
    shared = {"transformer_impl": implementation, "cp": context}
    if is_torch:
        shared["core_attention"] = "sdpa"
        cases = {
            "full": parity_case(**shared),
            "pruned-gqa": parity_case(**shared, projection="pruned", groups=2, skip_groups=2),
            "documents": parity_case(**shared, documents=[[0, 3, 8, 9], [0, 11]]),
        }
    else:
        kinds = {kind: its for kind, its in EXCHANGES.items() if context == 4 or not its}
        cases = {kind: parity_case(**shared, cp_comm_type=kind, **its) for kind, its in kinds.items()}
    title = f"{implementation} CP={context}"
    answers = gpu.parity(title, cases, context, tmp_path, has_fp32=is_torch)
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
def test_experts_overlapped(size: int, implementation: str, tmp_path: Path) -> None:
    """Layers as nodes of a schedule on two streams, weights' gradients delayed: the same training, no K/V left."""
    flags = NO_DROPOUT | EXPERTS | {"transformer_impl": implementation, "expert_model_parallel_size": 2}
    flags |= {"global_batch_size": 8 * size, "no_persist_layer_norm": True}
    pipeline = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2}
    requests = {}
    for layout, split in {"pp1": {}, **({"pp2v2": pipeline} if size > 2 else {})}.items():
        more = {"plain": {}, "overlapped": {"overlap_moe_expert_parallel_comm": True}}
        if implementation == "transformer_engine":
            more["delayed"] = {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True}
        requests |= {f"{layout}.{name}": {"argv": argv(**flags, **split, **its)} for name, its in more.items()}
    answers = train_on_all_ranks(requests, size, tmp_path)
    for name in requests:
        expected, found = figures(answers[f"{name.split('.')[0]}.plain"]), figures(answers[name])
        for what in ("loss", "grad_norm"):
            assert found[what] == pytest.approx(expected[what], rel=BF16_TOLERANCE), (name, what)
        assert [answer["alive"] for answer in answers[name]] == [0] * size, name
        print(f"{gpu.DEVICE} {name}: losses {found['loss']}")


@pytest.mark.parametrize("implementation", gpu.IMPLEMENTATIONS)
def test_a_pipelines_step_as_a_cuda_graph(implementation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two interleaved ranks, K/V between them: losses and gradient norms are those of the run without."""
    gpu.prepare(monkeypatch, 2)
    flags = {"tensor_model_parallel_size": 1, "transformer_impl": implementation, "sla": True, "sla_skip_distance": 2}
    flags |= {"no_gradient_accumulation_fusion": True, "no_persist_layer_norm": True}
    flags |= {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
    runs = {name: figures(run) for name, run in train_on_all_ranks(gpu.graph_requests(**flags), 2, tmp_path).items()}
    for what in ("loss", "grad_norm", "evaluations"):
        assert runs["graph"][what] == pytest.approx(runs["eager"][what], rel=LOSS_TOLERANCE)


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
