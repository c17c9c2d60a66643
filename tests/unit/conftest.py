"""What the unit tests share: Megatron, imported once, on the CPU."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from sla_megatron import cpu_backend

# A machine that is busy with something else is slow, not wrong.
settings.register_profile("unit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unit")

#: Importing these brings in all of Megatron that the unit tests need.
_MEGATRON = ("megatron.training.training", "sla_megatron.flags.arguments", "sla_megatron.model.builder")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny: starting threads for them takes longer than what these do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def megatron_imported() -> None:
    """Megatron is imported once, as the entry point does it, inside the CPU backend, which is left again."""
    with warnings.catch_warnings(action="ignore"), cpu_backend():
        for name in _MEGATRON:
            importlib.import_module(name)


@pytest.fixture
def megatron(megatron_imported: None) -> Iterator[None]:
    """The CPU backend is entered for the length of a test."""
    with cpu_backend():
        yield


@pytest.fixture(scope="module")
def one_rank(megatron_imported: None) -> Iterator[None]:
    """A process group of one, which Megatron's layers ask for its size, on the CPU backend."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with cpu_backend():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
