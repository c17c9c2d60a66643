"""What Slurm gave a job, beside what its ranks need."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...common.checkpoint_contents import size
from ...common.checkpoint_folders import checkpoints, newest_complete
from .flags import JobError
from .given import values

#: Named overrides of launch/slurm.sbatch.
OVERRIDES = (
    *("PRESETS", "SCRIPT", "MODULE", "SETUP", "RUN_DIR", "CHECKPOINTS", "KEEP", "CHECK", "STAGE", "LAUNCH", "NPROC"),
    *("PYTHON", "MAX_FAILURES", "SAVE_SECONDS", "HEALTH_CHECK", "STAY", "MAX_EXCLUDED", "DOCTOR", "BIND"),
    *("CONTAINER_IMAGE", "CONTAINER_MOUNTS", "CONTAINER_OPTIONS", "CONTAINER_RUNTIME"),
    *("MASTER_ADDR", "MASTER_PORT", "SLA_ROOT", "DRY_RUN"),
)

#: One that keeps its GPU busy, and one for its data-loader workers and communication.
CORES_A_RANK = 2


def lost_overrides(exported: str, given: Mapping[str, str] = os.environ) -> str | None:
    """A line on overrides of the shell that submitted, which ``sbatch --export`` may have kept from the job."""
    if exported == "ALL" or exported.startswith("ALL,"):
        return None
    named = {word.partition("=")[0] for word in exported.split(",")}
    lost = [name for name in OVERRIDES if name not in named and name not in given]
    if not lost:
        return None
    return (
        f"--export={exported}: if any of these was set where the job was submitted, it was lost: {' '.join(lost)}; "
        "expected as words before the flags: launch/slurm.sbatch PRESETS=... --train-iters ..."
    )


def check_processes(flags: Sequence[str], processes: int, say: Callable[[str], None]) -> None:
    """Say, or refuse, what would be trained on other processes than was meant.

    Raises:
        JobError: where a job for GPUs has none.
    """
    if os.environ.get("SLURM_GPUS_ON_NODE"):
        return
    in_job = "SLURM_JOB_ID" in os.environ
    if (values(flags, "--device") or ["auto"])[-1] == "cpu":
        if in_job:
            say(f"--device cpu: {processes} processes a node")
    elif os.environ.get("NPROC"):
        if in_job:
            where = "on GPUs that it does not know of, or on the CPU"
            say(f"Slurm gave no GPU: NPROC={processes} processes a node, {where}")
    elif os.environ.get("DRY_RUN") == "1":
        say(f"no GPU here: {processes} processes a node; NPROC= shows another number")
    else:
        raise JobError(
            "--gpus-per-node: Slurm gave no GPU: expected GPUs; or --device cpu; or NPROC=, processes a node, where "
            "Slurm does not know of its GPUs"
        )


def say_what_is_scarce(
    save: Path, nodes: int, processes: int, say: Callable[[str], None], given: Mapping[str, str] = os.environ
) -> None:
    """Cores of a node for its ranks, and its memory for its part of the newest checkpoint, by number.

    How much a run needs before its first checkpoint, `sla-doctor` says: that takes Megatron's reading of the flags.
    """
    cores = given.get("SLURM_CPUS_ON_NODE", "")
    if cores.isdecimal() and int(cores) < CORES_A_RANK * processes:
        say(
            f"Slurm gave {cores} cores a node for {processes} ranks, which want {CORES_A_RANK * processes}: "
            f"--exclusive, or --cpus-per-task={CORES_A_RANK * processes}"
        )
    memory = _memory(given, int(cores) if cores.isdecimal() else 1)
    if memory is None:
        return
    newest, _ = newest_complete(save)
    if newest is None:
        return
    part = size(checkpoints(save)[newest]) / nodes
    if memory < part:
        say(
            f"Slurm gave {memory / 2**30:.1f} GiB a node, whose part of the checkpoint of iteration {newest} is "
            f"{part / 2**30:.1f} GiB: --mem=0 with --exclusive, or --mem={part / 2**30 * 2:.0f}G"
        )


def _memory(given: Mapping[str, str], cores: int) -> float | None:
    """Bytes of a node; Slurm says MiB, and 0 for all that there is."""
    node, core = given.get("SLURM_MEM_PER_NODE", ""), given.get("SLURM_MEM_PER_CPU", "")
    if node.isdecimal() and int(node):
        return int(node) * 2**20
    return int(core) * cores * 2**20 if core.isdecimal() and int(core) else None
