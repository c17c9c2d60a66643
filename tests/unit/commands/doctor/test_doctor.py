"""The checks of ``sla-doctor`` on what a node has: each well, and each with its fault."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sla_megatron.commands.doctor import gpus, job, layout, tiny, upstream, versions
from sla_megatron.commands.doctor.finding import FAIL, OK, SKIP, WARN, Doubt, Fault, Skipped, found
from sla_megatron.commands.doctor.place import Place
from sla_megatron.common import environment
from sla_megatron.upstream.seams import SeamError
from tests.support.runs import argv

ALONE = Place(0, 1, 0, "node", launched=False)

JobArgs = Callable[..., Namespace]


@pytest.fixture
def job_args(megatron: None, monkeypatch: pytest.MonkeyPatch) -> JobArgs:
    """The arguments of a job with the flags of ``runs.MODEL`` and changes, as a process alone settles them."""

    def settle(place: Place = ALONE, num_gpus: int | None = None, on_cpu: bool = False, **changes: Any) -> Namespace:
        monkeypatch.setattr(sys, "argv", ["sla-doctor", *argv(**{"sla": True, **changes})])
        return job.job_args(place, num_gpus, on_cpu)

    return settle


def fault_of(examine: Callable[..., str], *arguments: Any, **named: Any) -> str:
    with pytest.raises(Fault) as fault:
        examine(*arguments, **named)
    assert "\n" not in str(fault.value)
    return str(fault.value)


def test_what_a_check_raises_is_its_finding() -> None:
    """An error that nobody expected is a fault too, in one line."""

    def raises(error: Exception) -> Callable[[], str]:
        def examine() -> str:
            raise error

        return examine

    assert found("a", lambda: "fine").status == OK
    assert found("a", raises(Skipped("no need"))).status == SKIP
    assert found("a", raises(Doubt("odd"))).status == WARN
    finding = found("a", raises(ValueError("two\nlines " + "x" * 500)))
    assert (finding.status, finding.text[:22], len(finding.text)) == (FAIL, "ValueError: two lines ", 300)


# Versions


def test_versions() -> None:
    assert versions.python_version().startswith(".".join(map(str, sys.version_info[:3])))
    assert versions.torch_versions("cpu").startswith(torch.__version__)
    assert fault_of(versions.python_version, (3, 11, 4)) == "3.11.4: expected 3.12 or newer"


@pytest.mark.parametrize(
    ("torch_version", "cuda", "nccl", "device", "expected"),
    [
        ("2.4.1+cu121", "12.1", True, "cpu", "2.4.1+cu121: expected 2.6 or newer"),
        ("2.15.0", None, False, "cuda", "2.15.0 is built without CUDA: expected a CUDA build, or --device cpu"),
        ("2.15.0", "13.2", False, "cuda", "2.15.0 is built without NCCL: expected a build with it, or --device cpu"),
    ],
)
def test_a_torch_that_does_not_do(
    monkeypatch: pytest.MonkeyPatch, torch_version: str, cuda: str | None, nccl: bool, device: str, expected: str
) -> None:
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    assert fault_of(versions.torch_versions, device) == expected


def implementation(name: str, fusion: bool = False) -> Namespace:
    return Namespace(transformer_impl=name, gradient_accumulation_fusion=fusion)


def test_transformer_engine_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda distribution, module: None)
    expected = "not installed: expected transformer-engine, or --transformer-impl local"
    assert fault_of(versions.transformer_engine, implementation("transformer_engine"), "cuda") == expected
    assert "not needed" in versions.transformer_engine(implementation("local"), "cuda")
    with pytest.raises(Skipped, match="the local implementation is used"):
        versions.transformer_engine(implementation("transformer_engine"), "cpu")
    monkeypatch.setattr(versions, "installed_version", lambda distribution, module: "2.9")
    assert versions.transformer_engine(implementation("transformer_engine"), "cuda").startswith("2.9, used")


def test_apex_where_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    assert versions.apex(implementation("local"), "cuda") == "not installed; torch's norms and optimizers are used"
    with pytest.raises(Skipped):
        versions.apex(implementation("local", True), "cpu")


def test_megatron_and_its_names(megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.gpt import gpt_model
    from megatron.core.pipeline_parallel import schedules

    before = schedules.forward_backward_pipelining_with_interleaving
    assert upstream.megatron_release().startswith("0.")
    assert "look as expected" in upstream.upstream_names()
    assert schedules.forward_backward_pipelining_with_interleaving is before
    monkeypatch.setattr(gpt_model, "TransformerBlock", lambda config, other: None)
    assert "TransformerBlock has parameters ('config', 'other')" in fault_of(upstream.upstream_names)

    def of_another_version() -> str:
        raise SeamError("megatron-core 0.17.0")

    monkeypatch.setattr(upstream, "require_megatron", of_another_version)
    assert fault_of(upstream.megatron_release) == "megatron-core 0.17.0"


# GPUs


class Cuda:
    """What stands for ``torch.cuda`` on a node with some GPUs."""

    def __init__(self, *names: str, free: float = 0.99) -> None:
        self._names, self._free = names, free

    def is_available(self) -> bool:
        return bool(self._names)

    def device_count(self) -> int:
        return len(self._names)

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(name=self._names[index], total_memory=80 << 30)

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return int(self._free * (80 << 30)), 80 << 30

    def synchronize(self, index: int) -> None:
        pass


@pytest.fixture
def multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "multiplies", lambda cuda, index: True)


def test_gpus_that_do(multiply: None) -> None:
    found = gpus.gpus("auto", 2, Cuda("H100", "H100"), True, {})
    assert found == "2 x H100, 80 GiB; each multiplies matrices"


@pytest.mark.parametrize(
    ("requested", "cuda", "environment", "expected"),
    [
        ("cuda", Cuda(), {}, "torch sees 0 GPUs: expected a GPU for each rank, or --device cpu"),
        ("auto", Cuda(), {"SLURM_GPUS_ON_NODE": "8"}, "torch sees 0 GPUs, and Slurm gave this node 8: expected"),
        (
            "auto",
            Cuda("H100"),
            {"CUDA_VISIBLE_DEVICES": "0"},
            "torch sees 1 GPU (CUDA_VISIBLE_DEVICES=0): expected 2, one for each rank of this node",
        ),
        ("auto", Cuda("H100", "A100"), {}, "2 GPUs of different kinds (A100, 80 GiB; H100, 80 GiB)"),
    ],
)
def test_gpus_that_do_not(
    multiply: None, requested: str, cuda: Cuda, environment: dict[str, str], expected: str
) -> None:
    assert fault_of(gpus.gpus, requested, 2, cuda, True, environment).startswith(expected)


def test_gpus_that_are_used_or_broken(multiply: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Doubt, match="1 x H100, 80 GiB; in use before the job: 40 GiB of GPU 0"):
        gpus.gpus("auto", 1, Cuda("H100", free=0.5), True, {})

    def broken(cuda: Any, index: int) -> bool:
        if index == 1:
            raise RuntimeError("CUDA error: an illegal memory access")
        return index == 0

    monkeypatch.setattr(gpus, "multiplies", broken)
    text = fault_of(gpus.gpus, "auto", 3, Cuda("H100", "H100", "H100"), True, {})
    assert text == "GPU 1: RuntimeError: CUDA error: an illegal memory access; GPU 2 multiplies matrices wrongly"


@pytest.mark.parametrize(
    ("requested", "launched", "reason"),
    [("cpu", True, "--device cpu"), ("auto", True, "would run on the CPU"), ("cuda", False, "on the job's ranks")],
)
def test_no_gpu_needed(requested: str, launched: bool, reason: str) -> None:
    with pytest.raises(Skipped, match=reason):
        gpus.gpus(requested, 2, Cuda(), launched, {})


def test_a_product_is_compared(megatron: None) -> None:
    """With the CPU backend, in which "cuda" means the CPU."""
    assert gpus.multiplies(Cuda("cpu"), 0)


# Flags


def test_flags_that_do(job_args: JobArgs) -> None:
    """The fewest GPUs that fit, or as many as are said."""
    args = job_args(pipeline_model_parallel_size=2)
    assert job.sizes(args).startswith("world size 4: TP 2 x PP 2; 4 layers, 4 heads; 8 samples a step")
    assert "TP 2 x DP 4" in job.sizes(job_args(num_gpus=8))
    assert job_args(Place(3, 8, 3, "node", launched=True)).rank == 3


_TE = {"tensor_model_parallel_size": 1}
_MOE = _TE | {"num_experts": 4, "moe_router_topk": 2, "disable_bias_linear": True}
_LENGTH = {"seq_length": 24, "max_position_embeddings": 24}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"context_parallel_size": 2}, "world size 4: TP 2 x CP 2; 4 layers"),
        (
            {"context_parallel_size": 2, "pipeline_model_parallel_size": 2, "num_gpus": 16},
            "world size 16: TP 2 x PP 2 x CP 2 x DP 2; 4 layers, 4 heads; 8 samples a step, 2 microbatches of 2",
        ),
        # 24 positions are six chunks for three ranks, and not sixteen for eight.
        (_TE | _LENGTH | {"context_parallel_size": 3}, "world size 3: CP 3; "),
        (
            _MOE | {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "context_parallel_size": 2},
            "world size 4: PP 2 x CP 2, experts TP 1 x EP 2; ",
        ),
        # Experts count on replicas: four of them, on four ranks.
        (_MOE | {"expert_model_parallel_size": 4}, "world size 4: DP 4, experts TP 1 x EP 4; "),
    ],
)
def test_how_the_ranks_divide(job_args: JobArgs, changes: dict[str, Any], expected: str) -> None:
    """Over contexts and experts as well; by hand."""
    assert job.sizes(job_args(**changes)).startswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sla_skip_distance": 0}, "--sla-skip-distance 0: expected one or more integers >= 1"),
        ({"num_layers": 3, "pipeline_model_parallel_size": 2}, "Megatron does not accept these flags: "),
        ({"num_gpus": 3}, "Megatron does not accept these flags: world size (3) is not divisible by"),
        (
            _TE | _LENGTH | {"context_parallel_size": 8},
            "Megatron does not accept these flags: seq-length should be a multiple of 2 * context-parallel-size",
        ),
        (
            {"context_parallel_size": 2, "num_gpus": 6},
            "Megatron does not accept these flags: world size (6) is not divisible by total_model_size (total_model",
        ),
        (
            _TE | {"context_parallel_size": 4, "cp_comm_type": "a2a+p2p"},
            "Megatron does not accept these flags: --hierarchical-context-parallel-sizes must be set",
        ),
        (_TE | {"expert_model_parallel_size": 2}, "Megatron does not accept these flags: num_experts must be non None"),
        (
            _MOE | {"expert_model_parallel_size": 3, "global_batch_size": 6},
            "Megatron does not accept these flags: Number of experts should be a multiple of expert model parallel_si",
        ),
        (
            _MOE | {"expert_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "num_gpus": 4},
            "--expert-model-parallel-size 4: expected a size that with",
        ),
        (_MOE | {"moe_router_topk": 5}, "--moe-router-topk 5: expected at most as many as --num-experts"),
        (_MOE | {"tensor_model_parallel_size": 2}, "--num-experts 4: expected --sequence-parallel beside it"),
        ({"no_such_flag": True}, "--no-such-flag: expected a known flag"),
        ({"hidden_size": "wide"}, "--hidden-size wide: expected an integer"),
        ({"multi_latent_attention": True}, "--multi-latent-attention True: expected no multi-latent attention"),
        ({"on_cpu": True, "context_parallel_size": 2}, "--context-parallel-size 2: expected --core-attention sdpa"),
    ],
)
def test_flags_that_do_not(job_args: JobArgs, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(Fault) as fault:
        job_args(**changes)
    assert str(fault.value).startswith(expected)


def test_another_world_size_than_the_jobs(job_args: JobArgs) -> None:
    with pytest.raises(Fault, match="--num-gpus 4: expected the job's world size, 8, or nothing"):
        job_args(Place(0, 8, 0, "node", launched=True), num_gpus=4)


# The layout


def test_the_tiny_model_keeps_what_is_spread(job_args: JobArgs) -> None:
    """Layers, heads, groups, sizes of the groups of ranks; not the widths."""
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "seq_length": 8192, "max_position_embeddings": 8192}
    args = job_args(pipeline_model_parallel_size=2, **sizes)
    small = tiny.tiny_args(args)
    assert (small.num_layers, small.num_attention_heads, small.sla_skip_distance) == (4, 32, args.sla_skip_distance)
    assert (small.tensor_model_parallel_size, small.pipeline_model_parallel_size) == (2, 2)
    assert (small.hidden_size, small.kv_channels, small.seq_length) == (64, 32, 64)
    assert tiny.num_microbatches(small) == 2
    assert args.hidden_size == 4096


def test_alone_the_layout_is_one_stage(job_args: JobArgs) -> None:
    masks = {"reset_attention_mask": True, "transformer_impl": "local", "no_masked_softmax_fusion": True}
    args = job_args(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1, bf16=True, **masks)
    text = layout.layout(args, torch.distributed.HashStore(), 60, launched=False)
    assert text.startswith("one process, not the job's layout: loss 4.")
    assert not torch.distributed.is_initialized()
    one = copy.copy(args)
    one.fp8 = "hybrid"
    with pytest.raises(Skipped, match="needs a GPU: --fp8-format hybrid"):
        tiny.on_one_process(one)


def test_alone_a_hybrid_model_is_one_stage_too(job_args: JobArgs) -> None:
    args = job_args(pipeline_model_parallel_size=2, hybrid_layer_pattern="*-|*-*|-|*", transformer_impl="local")
    assert "PP 2 x VPP 2; 7 layers *-|*-*|-|*, 4 of attention, 4 heads" in job.sizes(args)
    text = layout.layout(args, torch.distributed.HashStore(), 60, launched=False)
    assert text.startswith("one process, not the job's layout: loss 4.")
    assert args.hybrid_layer_pattern == "*-|*-*|-|*"
    args.hybrid_layer_pattern = "M-|G-*|-|*"
    with pytest.raises(Skipped, match="needs a GPU: layers of G and M"):
        tiny.on_one_process(args)


def test_losses_and_gradients_must_be_finite() -> None:
    chunk = torch.nn.Linear(2, 1)
    assert "weight has no gradient" in fault_of(layout.checked_gradients, [chunk])
    chunk(torch.ones(1, 2)).sum().backward()
    assert layout.checked_gradients([chunk]) == 2
    chunk.weight.grad[0, 1] = float("nan")
    assert fault_of(layout.checked_gradients, [chunk]) == "the gradient of weight is not finite"
    chunk.zero_grad(set_to_none=False)
    assert "virtual stage 0 are zero" in fault_of(layout.checked_gradients, [chunk])
    assert layout.checked_loss([1.0, 3.0]) == 2.0
    assert "microbatch 1 is inf" in fault_of(layout.checked_loss, [1.0, float("inf")])
