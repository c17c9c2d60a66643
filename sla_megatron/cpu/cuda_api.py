"""Stand-ins for the parts of ``torch.cuda`` that Megatron calls: one device, no streams, the CPU's generator.

Dropout on CPU tensors draws from torch's default CPU generator, so that is what stands for "the GPU's generator"
everywhere; Megatron's tensor-parallel RNG tracker then works as it does on a GPU.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

DEVICE_INDEX = 0


def nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for calls whose only effect is on a GPU."""


def skip_warm_up(tp_size: int) -> None:
    """Stands for ``set_jit_fusion_options``: nothing is compiled on the CPU."""


def zero(*args: Any, **kwargs: Any) -> int:
    """Stands for memory figures: nothing is allocated on a GPU."""
    return 0


class Stream:
    """Work is done when a call returns, so a stream has nothing to order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    wait_stream = wait_event = synchronize = nothing

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class Event:
    """Host clock in place of the GPU's; times in milliseconds, as ``torch.cuda.Event``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    wait = synchronize = nothing

    def record(self, stream: Stream | None = None) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1000.0 * (end._seconds - self._seconds)


_STREAM = Stream()


def current_stream(device: Any = None) -> Stream:
    return _STREAM


def stream(_: Any) -> nullcontext:
    """Stands for ``torch.cuda.stream(...)``, a context manager."""
    return nullcontext()


def device(_: Any) -> nullcontext:
    """Stands for ``torch.cuda.device(...)``, a context manager."""
    return nullcontext()


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.default_generator.set_state(new_state)


def manual_seed(seed: int) -> None:
    # Not torch.manual_seed: that calls torch.cuda.manual_seed_all.
    torch.default_generator.manual_seed(seed)


def megatron_get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return get_rng_state()


def megatron_set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    set_rng_state(new_state)


def get_device_properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1)


def get_device_capability(device: Any = None) -> tuple[int, int]:
    return (8, 0)


class UnpinnedDataLoader(torch.utils.data.DataLoader):
    """A DataLoader that pins no memory and draws its worker seed from a generator of its own.

    Only tensor-parallel rank 0 reads data.  With the CPU's generator standing for the GPU's, a draw there alone would
    give each tensor-parallel rank other dropout masks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["pin_memory"] = False
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(*args, **kwargs)


class DeviceMeshOfCpus:
    """Stands for ``DeviceMesh`` where Megatron makes one for FSDP2: of the same ranks, and on the CPU."""

    @staticmethod
    def from_group(group: ProcessGroup, device_type: str) -> DeviceMesh:
        return DeviceMesh.from_group(group, "cpu")
