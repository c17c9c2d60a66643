"""Mixing in one operation each way: against plain torch, on a processor and, interpreted, as the GPU's kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.counting import OperationCounter
from sla_megatron.attention.mixing import mix, naive
from sla_megatron.attention.mixing_plan import LayerPlan, MixingPlan, OwnHeads
from sla_megatron.attention.roles import LayerRole
from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.pipeline import copy_kernel, copying

ROOT = Path(__file__).parents[3]


def layer_plan(sla: SLAConfig, layer: int, queries: int = 1, whole: bool = False) -> MixingPlan:
    """Of a layer, with the pieces that come to it as their source cuts them, or whole."""
    role = LayerRole.of(sla, layer)
    taken = []
    for shared in role.takes:
        of_source = LayerRole.of(sla, shared.source)
        groups = [
            (sum(origin == one for kind in of_source.both for origin, _ in kind.read),) for one in of_source.takes
        ]
        source = LayerPlan.of(of_source, OwnHeads.in_projection(of_source, 1), groups)
        before = list(source.handed_on)[: list(source.handed_on).index(shared)]
        at = 3 + sum(source.handed_on[one] for one in before)
        sizes = tuple(len(heads) for heads in source.mixing.outputs[at : at + source.handed_on[shared]])
        taken.append((sum(sizes),) if whole else sizes)
    return LayerPlan.of(role, OwnHeads.in_projection(role, queries), taken).mixing


FAR, NEAR, TWO = (SLAConfig(12, 12, distances, 9) for distances in ((9,), (1,), (9, 5)))
V1 = SLAConfig(12, 12, (), 6, share="values", source_layers=(1,))
V1_PRUNED, KEYS = replace(V1, kv_projection="pruned"), replace(V1, share="keys", kv_projection="pruned")
PLANS = {
    "source": layer_plan(FAR, 1),
    "reader": layer_plan(FAR, 10),
    "reader of what lies whole": layer_plan(FAR, 10, whole=True),
    "reader and source": layer_plan(NEAR, 5),
    "two distances": layer_plan(TWO, 11),
    "grouped queries": layer_plan(SLAConfig(12, 4, (9,), 3), 10, queries=3),
    "source of grouped queries": layer_plan(SLAConfig(12, 4, (9,), 3), 2, queries=3),
    "pruned": layer_plan(SLAConfig(12, 12, (9,), 9, kv_projection="pruned"), 10),
    "uneven": layer_plan(SLAConfig(12, 11, (3, 5), 7), 9),
    "source of values": layer_plan(V1, 1),
    "reader of values": layer_plan(V1, 7),
    "reader of values, pruned": layer_plan(V1_PRUNED, 7),
    "reader of keys, pruned, grouped queries": layer_plan(KEYS, 7, queries=2),
    "reader and source of values": layer_plan(replace(NEAR, share="values"), 5),
    "reader and source, two sources": layer_plan(SLAConfig(12, 12, (), 12, source_layers=(1, 5)), 5),
    "nothing of its own, pruned": layer_plan(SLAConfig(4, 4, (1,), 4, (2, 4), "pruned"), 4),
    "empty": MixingPlan((0, 2), (((1, 1),), ())),
}
#: Strides of a tensor [s, b, heads, d]: as they come, padded, batch first, head size not last.
STRIDES = ("contiguous", "padded", "batch first", "transposed")
#: s, b, d: also sizes that are no power of two, and a single row.
SIZES = ((8, 2, 16), (7, 3, 6), (1, 1, 20))


def strided(shape: tuple[int, ...], how: str, dtype: torch.dtype, generator: torch.Generator, device: str) -> Tensor:
    s, b, heads, d = shape
    random = {
        "contiguous": lambda: torch.randn(s, b, heads, d, generator=generator),
        "padded": lambda: torch.randn(s, b, heads + 1, d + 2, generator=generator)[:, :, 1:, 1:-1],
        "batch first": lambda: torch.randn(b, heads, s, d, generator=generator).permute(2, 0, 1, 3),
        "transposed": lambda: torch.randn(s, b, d, heads, generator=generator).transpose(2, 3),
    }[how]()
    # The same strides in another type.
    whole = torch.empty(random.untyped_storage().nbytes() // random.itemsize, dtype=dtype, device=device)
    return whole.as_strided(random.shape, random.stride(), random.storage_offset()).copy_(random)


@contextmanager
def memory_full_of_nan() -> Iterator[None]:
    """What is allocated and not written to shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def largest_errors(
    plan: MixingPlan, how: str, size: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[float, float]:
    """Of values and of gradients, against double precision."""
    generator = torch.Generator().manual_seed(1)
    s, b, d = size
    # In one tensor, as the pieces of a bundle are: the kernel reaches so many.
    whole = strided((s, b, sum(plan.inputs), d), how, dtype, generator, device)
    inputs = list(whole.split(plan.inputs, dim=2))
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    for tensor in inputs:
        tensor.requires_grad_()
    outputs = [len(heads) > 0 for heads in plan.outputs]
    expected = naive(MixingPlan(plan.inputs, tuple(filter(None, plan.outputs))), exact)
    with memory_full_of_nan():
        found = [output for output, some in zip(mix(plan, inputs), outputs, strict=True) if some]
        gradients = [strided(tuple(output.shape), how, dtype, generator, device) for output in found]
        torch.autograd.backward(found, gradients)
    torch.autograd.backward(expected, [gradient.double() for gradient in gradients])
    zero = torch.zeros(())
    values = [(a.detach().double() - b.detach()).abs().max() for a, b in zip(found, expected, strict=True)]
    of_gradients = [
        (tensor.grad.double() - (0 if e.grad is None else e.grad)).abs().max()
        for tensor, e in zip(inputs, exact, strict=True)
        if tensor.numel()
    ]
    return max(values, default=zero).item(), max(of_gradients, default=zero).item()


#: A head is moved as it is; two gradients of at most 8 are added in fp32, and rounded once.  Interpreted, bf16 is cut
#: off, not rounded, which a GPU does not do.
TOLERANCES = {torch.float32: 4e-7, torch.float16: 2**-9, torch.bfloat16: 2**-5}


def cases() -> Iterator[tuple[str, str, tuple[int, int, int], torch.dtype]]:
    """Every plan once, and of two that between them have all there is, each type with each size, and each stride."""
    for name in PLANS:
        yield name, "padded", SIZES[1], torch.float32
    strides = cycle(STRIDES)
    for name in ("source", "reader and source"):
        for size in SIZES:
            for dtype in TOLERANCES:
                yield name, next(strides), size, dtype


def check_all(device: str = "cpu") -> int:
    """Check the cases; how many they are."""
    checked = list(cases())
    for name, how, size, dtype in checked:
        of_values, of_gradients = largest_errors(PLANS[name], how, size, dtype, device)
        # Written so that NaN fails.
        assert of_values == 0.0 and of_gradients <= TOLERANCES[dtype], (name, how, size, dtype)
    return len(checked)


def test_against_plain_torch() -> None:
    assert check_all() == len(PLANS) + 2 * len(SIZES) * len(TOLERANCES)


KERNEL = """
import json
from sla_megatron.pipeline import copy_kernel
launches, move = [], copy_kernel.move
copy_kernel.serves = lambda tensor: True
copy_kernel.move = lambda *args: launches.append(move(*args)) or launches[-1]
from tests.unit.attention.test_mixing import check_all
print(json.dumps([check_all(), len(launches), all(launches)]))
# Payloads, whose hidden states and tensors have heads of several shapes: a launch for each.
from sla_megatron.pipeline import packing
from tests.unit.pipeline.test_packing import COPIED, SHAPES, there_and_back
launches.clear()
for shape in SHAPES:
    for copied in COPIED:
        there_and_back(packing, shape, copied)
print(json.dumps([len(SHAPES) * len(COPIED), len(launches), all(launches)]))
"""


def test_the_kernel_against_plain_torch() -> None:
    """Interpreted, in a process of its own, since Triton asks when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", KERNEL],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (checked, launches, served), payloads = map(json.loads, done.stdout.splitlines()[-2:])
    assert checked == len(PLANS) + 2 * len(SIZES) * len(TOLERANCES)
    # Forward, where it copies, and backward: one each.
    assert checked < launches <= 2 * checked and served
    # There and back, forward and backward; hidden states and three kinds of heads, or fewer.
    assert 4 * payloads[0] < payloads[1] <= 3 * 4 * payloads[0] and payloads[2]


COMPILED = """
import re, sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sla_megatron.pipeline.copy_kernel import _kernel
for element in (tl.bfloat16, tl.float16, tl.float32):
    for aligned in (True, False):
        constants = dict(WIDTH=64, ELEMENT=element, MORE=1, ALIGNED=aligned, BLOCK_ROWS=64, BLOCK=64)
        types = {"table": "*i64", "batch": "i32", "rows": "i32"}
        names = _kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i64") for name in names}
        values = {(names.index(name),): value for name, value in constants.items()}
        ptx = compile(ASTSource(_kernel, signature, values, {}), target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        print(element, aligned, *sorted(set(re.findall(r"(?:ld|st)\\.global(?:\\.v\\d)?\\.b\\d+", ptx))))
"""


@pytest.mark.skipif(copy_kernel.triton is None, reason="no Triton")
def test_the_kernel_compiles_and_moves_16_bytes_at_a_time(tmp_path: Path) -> None:
    """For an H100, which is not needed for that: Triton's wheel has NVIDIA's assembler."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for _, aligned, *accesses in lines:
        # The table is read by 8 bytes.
        assert ({"ld.global.v4.b32", "st.global.v4.b32"} <= set(accesses)) == (aligned == "True")


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("source", 0, 2),
        ("reader", 1, 1),
        ("reader and source", 1, 1),
        ("two distances", 1, 1),
        ("pruned", 1, 1),
        ("source of values", 0, 2),
        ("reader of values", 1, 1),
        ("reader of values, pruned", 1, 1),
        ("reader of keys, pruned, grouped queries", 1, 1),
        ("reader and source of values", 1, 1),
        ("reader and source, two sources", 1, 2),
        # All gradients are views.
        ("nothing of its own, pruned", 1, 0),
    ],
)
def test_operations(name: str, forward: int, backward: int) -> None:
    """One each way, and one more where gradients are summed; spelled out it is far more."""
    counts = {}
    plan = PLANS[name]
    for how in (mix, naive):
        inputs = [torch.randn(4, 2, heads, 8).requires_grad_() for heads in plan.inputs]
        with OperationCounter() as there:
            outputs = how(plan, inputs)
        gradients = [torch.randn(output.shape) for output in outputs]
        # What is made once, a zero, is made before.
        torch.autograd.grad(how(plan, inputs), inputs, gradients)
        with OperationCounter() as back:
            torch.autograd.grad(outputs, inputs, gradients)
        counts[how] = (there.total, back.total)
    assert counts[mix] == (forward, backward)
    assert sum(counts[naive]) > (40 if plan.inputs[0] > 10 else 10)


def test_an_output_that_nobody_used_has_a_gradient_of_zeros() -> None:
    plan = PLANS["reader and source"]
    inputs = [torch.randn(4, 2, heads, 8).requires_grad_() for heads in plan.inputs]
    query, *_ = mix(plan, inputs)
    query.sum().backward()
    own = inputs[0].grad
    assert own[:, :, 0::3].eq(1).all() and own[:, :, 1::3].eq(0).all() and own[:, :, 2::3].eq(0).all()


def test_without_triton_torch_copies_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class OnGPU:
        is_cuda, dtype = True, torch.bfloat16

    monkeypatch.setattr(copy_kernel, "triton", None)
    copy_kernel._say_once.cache_clear()
    assert not copy_kernel.serves(OnGPU()) and not copy_kernel.serves(OnGPU())
    assert capsys.readouterr().out.count("no Triton here") == 1
    assert copying.copy_kernel is copy_kernel
