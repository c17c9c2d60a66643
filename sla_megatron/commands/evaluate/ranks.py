"""The ranks that hold one model, and copies of it: their device, process group and Megatron's parallel groups."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist

from ...common.errors import StartError
from ...cpu.backend import cpu_backend
from ...cpu.device import choose_device, megatron_device
from .arguments import EvaluationError, Sizes


class Ranks:
    """Megatron's process groups for ``sizes``, until :meth:`close`, on ``"cpu"`` or ``"cuda"``.

    Args:
        requested: as lm-eval's ``--device`` has it; ``None`` takes a GPU where there is one.
        sizes: of the model.

    Raises:
        EvaluationError: where the process is in a process group already, which may be of other sizes.
        FlagError: for a device that is not there.
    """

    def __init__(self, requested: str | None, sizes: Sizes) -> None:
        if dist.is_initialized():
            # Of a model that nobody holds any more, but that was not yet found to be gone.
            gc.collect()
        if dist.is_initialized():
            raise EvaluationError("this process has a process group already: expected none; close() ends a model's own")
        # What lm-eval says where its user says nothing; with several ranks, each has a GPU of its own.
        self.device = choose_device("auto" if requested in (None, "cuda:0") else requested)
        # As arguments.world_size has it: RANK may be there without a job, for Megatron's messages.
        self._is_alone = "WORLD_SIZE" not in os.environ
        if self.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        with self.megatron(), self.own_generators():
            # Imported here, on the device that was chosen.
            from megatron.core import parallel_state, tensor_parallel

            self._start()
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=sizes.tensor,
                pipeline_model_parallel_size=sizes.pipeline,
                expert_model_parallel_size=sizes.expert,
            )
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            self.copies = parallel_state.get_data_parallel_group()

    def _start(self) -> None:
        backend = "nccl" if self.device == "cuda" else "gloo"
        if self._is_alone:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)

    def megatron(self) -> AbstractContextManager[object]:
        """Within the block Megatron runs on this device; outside of it, torch is as it was."""
        return cpu_backend() if self.device == "cpu" else megatron_device(["--device", "cuda"])

    def own_generators(self) -> AbstractContextManager[None]:
        """Whatever is drawn within the block, generation later draws as lm-eval seeded it."""
        return torch.random.fork_rng([torch.cuda.current_device()] if self.device == "cuda" else [])

    @property
    def torch_device(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cuda", torch.cuda.current_device()) if self.device == "cuda" else torch.device("cpu")

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank has against the model inside the block ends it on all of them, with the same words."""
        mine = None
        try:
            yield
        except StartError as error:
            mine = error.reason
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        for reason in found:
            if reason is not None:
                raise EvaluationError(reason)

    def close(self) -> None:
        """End the groups; another model can be made then."""
        from megatron.core import parallel_state

        with self.megatron() if self.device == "cpu" else nullcontext():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
