"""Entering the CPU backend makes "cuda" mean the CPU; leaving it leaves no trace."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sla_megatron.common.errors import FlagError
from sla_megatron.cpu.backend import cpu_backend, cpu_backend_is_active
from sla_megatron.cpu.device import choose_device

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def outside(megatron_imported: None) -> None:
    """Megatron is imported, and the backend is not entered."""
    assert not cpu_backend_is_active()


@pytest.fixture
def entered() -> Iterator[None]:
    """The backend is entered for one test."""
    with cpu_backend():
        yield


def snapshot() -> dict[str, Any]:
    """Everything that hangs on an object that the backend replaces a name of, by the name of both."""
    from sla_megatron.cpu.replacements import replacements

    seen: dict[str, Any] = {}
    for seam in replacements():
        owner, name = seam.resolve()
        where = seam.target.removesuffix(name)
        seen[seam.target] = getattr(owner, name)
        seen |= {f"{where}{key}": value for key, value in vars(owner).items()}
    return seen


def differing(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The names whose object is another one, or that only one of the two has.

    Class methods and other bound values, made anew at each access, count by equality.
    """
    missing = object()
    pairs = ((key, before.get(key, missing), after.get(key, missing)) for key in before | after)
    return {key for key, one, other in pairs if one is not other and not (callable(one) and one == other)}


# Entering and leaving.


def test_leaving_restores_every_replaced_name() -> None:
    """Inside, exactly the listed names are others; outside, all are the identical objects again."""
    from sla_megatron.cpu.replacements import replacements

    before = snapshot()
    targets = {seam.target for seam in replacements()}
    for _ in range(2):
        with cpu_backend():
            # Everything resolves inside too, but signatures are those of the stand-ins.
            inside = {target: _value(target) for target in targets}
            assert differing({t: before[t] for t in targets}, inside) == targets
        assert differing(before, snapshot()) == set()


def _value(target: str) -> Any:
    module, _, path = target.partition(":")
    value = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


def test_an_error_inside_restores_too() -> None:
    """As leaving without one; the backend says that it is not active, and can be entered again."""
    before = snapshot()
    with pytest.raises(ZeroDivisionError), cpu_backend():
        raise ZeroDivisionError
    assert differing(before, snapshot()) == set()
    assert not cpu_backend_is_active()
    with cpu_backend():
        assert cpu_backend_is_active()


def test_no_function_mode_is_left() -> None:
    """Outside, asking for a GPU is an error again, and a tensor's type is its own."""
    with cpu_backend():
        assert torch._C._len_torch_function_stack() == 1
    assert torch._C._len_torch_function_stack() == 0
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_entering_twice_is_entering_once() -> None:
    """The inner block neither replaces again nor ends the outer one."""
    with cpu_backend():
        outer = torch.cuda.is_available
        with cpu_backend():
            assert torch.cuda.is_available is outer
            assert torch._C._len_torch_function_stack() == 1
        assert cpu_backend_is_active()
        assert torch.cuda.is_available is outer
        assert torch.zeros(1, device="cuda").device == CPU
    assert torch.cuda.is_available is not outer


def test_megatron_kept_none_of_the_stand_ins() -> None:
    """Megatron was imported inside the backend; no module of it holds on to a stand-in."""
    import sys

    from sla_megatron.cpu.replacements import replacements

    stand_ins = [seam.stand_in for seam in replacements() if callable(seam.stand_in)]
    modules = {name: module for name, module in sys.modules.items() if name.startswith(("megatron.", "torch."))}
    assert len(modules) > 500
    kept = [
        f"{name}.{key}"
        for name, module in modules.items()
        for key, value in list(getattr(module, "__dict__", {}).items())
        if any(value is stand_in for stand_in in stand_ins)
    ]
    assert kept == []


@pytest.mark.parametrize("users", [None, "7"], ids=["unset", "set-by-the-user"])
def test_environment_variables_are_restored(monkeypatch: pytest.MonkeyPatch, users: str | None) -> None:
    """A variable is set where the user has not set it, and taken away again; the user's value stays."""
    from sla_megatron.cpu.backend import ENVIRONMENT

    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
        if users is not None:
            monkeypatch.setenv(name, users)
    before = dict(os.environ)
    with cpu_backend():
        assert dict(os.environ) == ({**before, **ENVIRONMENT} if users is None else before)
    assert dict(os.environ) == before


def test_one_warning_is_silenced_inside(caplog: pytest.LogCaptureFixture) -> None:
    """That one, of that logger, and only inside."""
    from sla_megatron.cpu.replacements import SILENCED

    logger, message = logging.getLogger(SILENCED[0]), SILENCED[1]
    with cpu_backend():
        logger.warning(message)
        logger.warning("something else")
        logging.getLogger("megatron").warning(message)
    logger.warning(message)
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        (SILENCED[0], "something else"),
        ("megatron", message),
        (SILENCED[0], message),
    ]
    assert logger.filters == []


# "cuda" means the CPU.

DEVICES: list[Any] = ["cuda", "cuda:0", "cuda:3", torch.device("cuda"), torch.device("cuda", 1), 0, 2]


@pytest.mark.parametrize("device", DEVICES, ids=repr)
@pytest.mark.usefixtures("entered")
def test_every_name_of_a_gpu_means_the_cpu(device: Any) -> None:
    """As a factory's keyword, as an argument of ``to``, and for modules."""
    x = torch.zeros(2)
    made = [
        torch.empty(1, device=device),
        torch.tensor([1.0], device=device),
        torch.arange(3, device=device),
        torch.zeros_like(x, device=device),
        x.new_zeros(2, device=device),
        torch.nn.Linear(2, 2, device=device).weight,
        torch.nn.Linear(2, 2).to(device).weight,
        x.to(device),
        x.to(device, torch.float64),
        x.to(device=device, non_blocking=True),
        x.to(device, dtype=torch.float64),
    ]
    assert [tensor.device for tensor in made] == [CPU] * len(made)
    assert [tensor.dtype for tensor in made[8:]] == [torch.float64, torch.float32, torch.float64]


@pytest.mark.usefixtures("entered")
def test_cuda_calls_give_back_the_same_object() -> None:
    """A tensor's ``cuda`` and ``pin_memory`` and a module's ``cuda`` copy nothing, index or not."""
    x, module = torch.zeros(2), torch.nn.Linear(2, 2)
    weight = module.weight
    assert x.cuda() is x and x.cuda(0) is x and x.cuda(non_blocking=True) is x and x.pin_memory() is x
    assert module.cuda() is module and module.cuda(0) is module
    assert module.weight is weight and module.to("cuda").weight is weight


@pytest.mark.usefixtures("entered")
def test_recording_a_stream_does_nothing() -> None:
    """On the backend's own streams."""
    x = torch.zeros(2)
    assert x.record_stream(torch.cuda.current_stream()) is None
    assert x.record_stream(torch.cuda.Stream()) is None


@pytest.mark.usefixtures("entered")
def test_other_devices_stay_what_they_are() -> None:
    """``cpu`` and ``meta`` are not touched, nor is a conversion that names no device."""
    x = torch.zeros(2)
    assert torch.zeros(1, device="meta").is_meta and x.to("meta").is_meta
    assert torch.zeros(1, device="cpu").device == CPU
    assert x.to(torch.float64).dtype == torch.float64
    assert x.to(torch.ones(1, dtype=torch.int32)).dtype == torch.int32


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "FloatTensor"), (torch.bfloat16, "BFloat16Tensor"), (torch.float16, "HalfTensor")],
    ids=str,
)
@pytest.mark.usefixtures("entered")
def test_a_tensor_says_it_is_a_cuda_tensor(dtype: torch.dtype, name: str) -> None:
    """``type()`` answers as on a GPU, as Megatron's optimizers expect; ``type(dtype)`` still converts."""
    assert torch.zeros(1, dtype=dtype).type() == f"torch.cuda.{name}"
    assert torch.nn.Parameter(torch.zeros(1, dtype=dtype)).type() == f"torch.cuda.{name}"
    assert torch.zeros(1).type(dtype).dtype == dtype


@pytest.mark.usefixtures("entered")
def test_backward_functions_may_ask_for_a_gpu() -> None:
    """A ``backward`` that allocates on a GPU works, also in a backward inside another."""

    class Doubles(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return torch.full_like(grad, 2.0, device="cuda") * grad.cuda()

    class Recomputes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                again = Doubles.apply(x)
            torch.autograd.backward(again, grad)
            return x.grad

    x = torch.ones(3, requires_grad=True)
    Doubles.apply(x).sum().backward()
    torch.autograd.backward(Recomputes.apply(x).sum())
    assert torch.equal(x.grad, torch.full((3,), 4.0))


# torch.cuda.


@pytest.mark.usefixtures("entered")
def test_there_is_one_device() -> None:
    """Megatron counts a device, as it must to initialise model parallelism; torch sees no accelerator."""
    assert torch.cuda.is_available() and torch.cuda.is_initialized()
    assert (torch.cuda.device_count(), torch.cuda.current_device()) == (1, 0)
    assert torch.cuda.get_device_capability() >= (8, 0)
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_reserved(0) == 0
    assert not torch.accelerator.is_available()
    assert not torch.cuda.is_current_stream_capturing()


@pytest.mark.usefixtures("entered")
def test_streams_and_events_order_nothing() -> None:
    """What Megatron does with them runs, and times are not negative."""
    stream, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event()
    start.record()
    with torch.cuda.stream(stream), torch.cuda.device(0):
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_event(torch.cuda.default_stream().record_event())
    end.record(stream)
    torch.cuda.synchronize()
    assert stream.query() and end.query()
    assert start.elapsed_time(end) >= 0


@pytest.mark.usefixtures("entered")
def test_the_cpu_s_generator_stands_for_the_gpu_s() -> None:
    """Reading, writing and seeding "the GPU's" generator is the CPU's, also under its other name."""
    torch.cuda.manual_seed(11)
    first = torch.rand(4)
    torch.manual_seed(11)
    state = torch.cuda.get_rng_state()
    assert torch.equal(torch.rand(4), first)
    torch.cuda.random.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.cuda.set_rng_state(state, "cuda:0")
    assert torch.equal(torch.cuda.random.get_rng_state(), torch.get_rng_state())


@pytest.mark.usefixtures("entered")
def test_megatron_s_generator_tracker_forks_it() -> None:
    """A fork draws from its own seed, goes on where it was, and leaves the outer sequence as it was."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(5)
    expected_inside, expected_outside = torch.rand(8), None
    torch.manual_seed(3)
    expected_outside = torch.rand(8)

    torch.manual_seed(3)
    tracker = CudaRNGStatesTracker()
    tracker.add("fork", 5)
    drawn_outside = [torch.rand(4)]
    with tracker.fork("fork"):
        drawn_inside = [torch.rand(4)]
    drawn_outside.append(torch.rand(4))
    with tracker.fork("fork"):
        drawn_inside.append(torch.rand(4))
    assert torch.equal(torch.cat(drawn_inside), expected_inside)
    assert torch.equal(torch.cat(drawn_outside), expected_outside)


@pytest.mark.parametrize("consumes", [False, True], ids=["ours", "torch-s"])
def test_reading_data_does_not_consume_the_default_generator(consumes: bool) -> None:
    """A data loader inside the backend draws from its own generator; torch's, for comparison, does not."""
    with cpu_backend():
        loader = torch.utils.data.DataLoader
        if consumes:
            (loader,) = loader.__bases__
        before = torch.get_rng_state()
        read = [int(x) for x in loader(torch.arange(5), pin_memory=not consumes)]
        assert read == [0, 1, 2, 3, 4]
        assert (not torch.equal(torch.get_rng_state(), before)) == consumes


def test_data_is_not_pinned(entered: None) -> None:
    """Whatever was asked for: pinned memory needs a GPU.  A generator that was passed is kept."""
    generator = torch.Generator()
    loader = torch.utils.data.DataLoader(torch.arange(5), pin_memory=True, generator=generator)
    assert loader.pin_memory is False
    assert loader.generator is generator


# Choosing.


@pytest.mark.parametrize(
    ("requested", "has_gpu", "chosen"),
    [
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        ("cpu", True, "cpu"),
        ("cpu", False, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_choose_device(monkeypatch: pytest.MonkeyPatch, requested: str, has_gpu: bool, chosen: str) -> None:
    """A GPU where there is one, unless the CPU was asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_device(requested) == chosen


@pytest.mark.parametrize("requested", ["gpu", "", "CPU", "cuda:0", "tpu"])
def test_an_unknown_device_is_refused(requested: str) -> None:
    """The error lists the known ones."""
    shown = requested or "without a value"
    with pytest.raises(FlagError, match=f"--device {shown}: expected one of auto, cpu, cuda"):
        choose_device(requested)


@pytest.mark.parametrize("where", [pytest.param(cpu_backend, id="inside"), pytest.param(None, id="no-gpu")])
def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, where: Callable | None) -> None:
    """Also inside the backend, where ``torch.cuda`` claims to be there; ``auto`` is the CPU there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from contextlib import nullcontext

    with (where or nullcontext)():
        assert choose_device("auto") == "cpu"
        with pytest.raises(FlagError, match="--device cuda: expected cpu or auto on this machine"):
            choose_device("cuda")
