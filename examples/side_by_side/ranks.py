"""The processes of an example: Megatron on this one, or on one of several that it starts itself."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sla_megatron.common.errors import FlagError
from sla_megatron.common.launchers import end_with_parent, stop, torchrun
from sla_megatron.common.silence import without_announcements
from sla_megatron.cpu.device import choose_device, megatron_device


def is_first_rank() -> bool:
    """Whether this process speaks and writes for all."""
    return os.environ.get("RANK", "0") == "0"


def ranks_are_started(ranks: int) -> bool:
    """Whether this process is one of ``ranks`` that torchrun, or :func:`start_ranks`, has started.

    Raises FlagError, of ``--tp``, where it has started another number.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started not in (1, ranks):
        raise FlagError("--tp", ranks, f"{started}, the number of processes that torchrun started")
    return started == ranks


def start_ranks(module: str, argv: Sequence[str], ranks: int, device: str) -> None:
    """``python -m MODULE ARGV`` on ``ranks`` processes of this machine; ends this one if they fail, with their status.

    They end when this one does, whatever ends it.  Raises FlagError where there are not as many GPUs, or none for
    ``device``.
    """
    print(f"starting {ranks} processes", flush=True)
    if choose_device(device) == "cuda":
        import torch

        if ranks > (gpus := torch.cuda.device_count()):
            raise FlagError("--tp", ranks, f"at most {gpus}, the number of GPUs, or --device cpu")
    # As torchrun would say, in several lines, that it sets.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    launcher = subprocess.Popen([*torchrun(ranks), "-m", module, *argv], env=environment, preexec_fn=end_with_parent)
    try:
        status = launcher.wait()
    except BaseException:
        stop(launcher)
        raise
    if status:
        sys.exit(status)


@contextmanager
def megatron_started(args: argparse.Namespace, ranks: int = 1) -> Iterator[str]:
    """Within the block, Megatron's process groups, tensor-parallel over ``ranks``.

    Yields the device's name, ``cpu`` or the GPU's; ``args.device`` becomes ``cpu`` or ``cuda``.
    """
    if is_first_rank():
        print(f"{args.seeds} seeds, {args.steps} steps of each model; starting Megatron", flush=True)
    with without_announcements(), megatron_device(["--device", args.device]) as args.device:
        import torch
        from megatron.core import parallel_state

        # Matrices this small gain little from more, and on a busy machine the threads wait for each other.
        torch.set_num_threads(1)
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1} if ranks == 1 else {}
        torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo", **alone)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
        yield torch.cuda.get_device_name()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
