"""The GPUs of this node: there, alike, free, and able to compute."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .finding import Doubt, Fault, Skipped, error_line

#: Memory that may be in use on a GPU before the job, in bytes: what a CUDA context of our own takes, and to spare.
IDLE_BYTES = 2 << 30
_GIB = 1 << 30
#: Side of the matrices that are multiplied; whole numbers up to it are exact in bf16's fp32 sums.
_SIDE = 256


def gpus(
    requested: str,
    ranks_here: int,
    cuda: Any = None,
    launched: bool = True,
    environment: Mapping[str, str] = os.environ,
) -> str:
    """As many GPUs as this node has ranks, of one kind, each of which multiplies matrices.

    Call outside of the CPU backend.

    Args:
        requested: ``--device``'s value.
        ranks_here: ranks of the job on this node; a process alone does not know it and passes 0.
        cuda: ``torch.cuda``, or what stands for it.
        launched: whether the job's launcher started this: if not, the job need not run on this machine.
        environment: Slurm says there how many GPUs a node was given.
    """
    import torch

    cuda = torch.cuda if cuda is None else cuda
    if requested == "cpu":
        raise Skipped("--device cpu: none is used")
    count = cuda.device_count() if cuda.is_available() else 0
    if count == 0:
        _without_gpus(requested, launched, environment)
    if count < ranks_here:
        raise Fault(f"{_shown(count, environment)}: expected {ranks_here}, one for each rank of this node")
    kinds = {index: cuda.get_device_properties(index) for index in range(count)}
    broken = []
    for index in kinds:
        try:
            if not multiplies(cuda, index):
                broken.append(f"GPU {index} multiplies matrices wrongly")
        except RuntimeError as error:
            broken.append(f"GPU {index}: {error_line(error)}")
    if broken:
        raise Fault("; ".join(broken))
    names = sorted({f"{kind.name}, {kind.total_memory / _GIB:.0f} GiB" for kind in kinds.values()})
    if len(names) > 1:
        raise Fault(f"{count} GPUs of different kinds ({'; '.join(names)}): expected one kind")
    used = {index: total - free for index in kinds for free, total in [cuda.mem_get_info(index)]}
    busy = [f"{size / _GIB:.0f} GiB of GPU {index}" for index, size in used.items() if size > IDLE_BYTES]
    if busy:
        raise Doubt(f"{count} x {names[0]}; in use before the job: {', '.join(busy)}")
    return f"{count} x {names[0]}; each multiplies matrices"


def _without_gpus(requested: str, launched: bool, environment: Mapping[str, str]) -> None:
    if not launched:
        raise Skipped("no GPU on this machine; on the job's ranks each node's are examined")
    promised = environment.get("SLURM_GPUS_ON_NODE", "0")
    if requested == "cuda" or promised not in ("", "0"):
        given = f", and Slurm gave this node {promised}" if promised not in ("", "0") else ""
        raise Fault(f"{_shown(0, environment)}{given}: expected a GPU for each rank, or --device cpu")
    raise Skipped("no GPU on this node: the job would run on the CPU")


def _shown(count: int, environment: Mapping[str, str]) -> str:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    limited = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
    return f"torch sees {count} GPU{'' if count == 1 else 's'}{limited}"


def multiplies(cuda: Any, index: int) -> bool:
    """Whether GPU ``index`` finds the exact product of two matrices of ones, in fp32 and in bf16."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        ones = torch.ones(_SIDE, _SIDE, dtype=dtype, device=f"cuda:{index}")
        product = ones @ ones
        cuda.synchronize(index)
        if not bool((product == _SIDE).all()):
            return False
    return True
