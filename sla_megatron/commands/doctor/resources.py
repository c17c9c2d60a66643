"""Whether a node gives its ranks what they need: cores, also near their GPUs, memory, shared and locked too, and files.

None of it keeps a job from starting for certain, so that each is a doubt, with its numbers and what to do.
"""

from __future__ import annotations

import subprocess
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...attention.sla_config import compact_ranges
from ...common.amounts import shown_size
from ..job.resources import CORES_A_RANK
from .checkpoint_size import checkpoint_bytes, parameter_count
from .finding import Doubt, Skipped
from .host import Host, cores_of, gpu_cores

#: What NVIDIA has containers give /dev/shm for NCCL (--shm-size=1g): NCCL's user guide, "Runtime and MPI issues".
NCCL_SHARED_MEMORY = 1 << 30
#: Batches that torch's DataLoader has each worker prepare ahead (its ``prefetch_factor``).
_PREFETCHED = 2
#: Bytes of a token in a batch: tokens, labels and positions of eight bytes, and a loss mask of four.
_TOKEN_BYTES = 3 * 8 + 4

#: Open files: of a process with its libraries, data and logs, and for each rank of the job, of which the process that
#: serves the store has connections, and others have NCCL's or gloo's.  Rules of thumb.
_FILES, _FILES_A_RANK = 512, 4


@dataclass(frozen=True)
class Ranks:
    """The ranks of one node.

    Attributes:
        affinities: the cores that each may run on, as the kernel lists them, by LOCAL_RANK.
        world_size: of the job.
    """

    affinities: Sequence[str]
    world_size: int

    @property
    def here(self) -> int:
        """How many."""
        return len(self.affinities)


def cores(ranks: Ranks, host: Host) -> str:
    """At least :data:`CORES_A_RANK` for each rank; where ranks are bound, all of their cores together."""
    limits = host.cores()
    limits["affinity"] = len(set().union(*map(cores_of, ranks.affinities))) or limits["affinity"]
    least = min(limits, key=lambda name: limits[name])
    text = f"{limits[least]:g} core{'' if limits[least] == 1 else 's'} by {least} for {_of(ranks.here)}"
    expected = CORES_A_RANK * ranks.here
    if limits[least] < expected:
        raise Doubt(f"{text}: expected {expected}, {CORES_A_RANK} a rank (--cpus-per-task, or --exclusive)")
    return text


def memory(args: Namespace, vocabulary: int | None, ranks: Ranks, on_cpu: bool, host: Host) -> str:
    """Room for the ranks themselves and, if the job saves, for a copy of what this node writes of a checkpoint.

    Megatron copies what a rank saves to the host's memory before it is written; with --async-save while training goes
    on.
    """
    limits = host.memory()
    if not limits:
        raise Skipped("/proc/meminfo cannot be read")
    least = min(limits, key=lambda name: limits[name])
    own = ranks.here * host.resident()
    parts = [f"{shown_size(own)} of {_of(ranks.here)} at start"]
    if args.save is not None or on_cpu:
        share = checkpoint_bytes(args, parameter_count(args, vocabulary)) * ranks.here // ranks.world_size
        if on_cpu:
            own += share
            parts.append(f"{shown_size(share)} of weights and optimizer")
        if args.save is not None:
            own += share
            when = "while training goes on" if args.async_save else "while it is saved"
            parts.append(f"{shown_size(share)} of a checkpoint {when}")
    text = f"{shown_size(limits[least])} by {least}; {' and '.join(parts)}"
    if limits[least] < own:
        raise Doubt(f"{text}: expected {shown_size(own)} or more (--mem=0 asks Slurm for all of a node's)")
    return text


def numa(ranks: Ranks, host: Host, topology: Callable[[], str]) -> str:
    """Every rank may run on some of the cores near its GPU, GPU ``LOCAL_RANK``."""
    nodes = host.numa_nodes()
    if len(nodes) < 2:
        raise Skipped("one NUMA node")
    near = gpu_cores(topology())
    if len(near) < ranks.here or not any(near):
        raise Skipped(f"{len(nodes)} NUMA nodes; nvidia-smi topo -m does not say which cores are near the GPUs")
    far = []
    for rank, (listed, of_gpu) in enumerate(zip(ranks.affinities, near, strict=False)):
        own = cores_of(listed)
        if of_gpu and own and own.isdisjoint(of_gpu):
            far.append(f"local rank {rank} has cores {listed}, its GPU is near {compact_ranges(sorted(of_gpu))}")
    if far:
        more = f" (and {len(far) - 1} more)" if len(far) > 1 else ""
        raise Doubt(
            f"{far[0]}{more}: expected cores of the GPU's NUMA node (BIND= of launch/slurm.sbatch, or --cpu-bind)"
        )
    spread = [sum(not cores_of(listed).isdisjoint(cores) for cores in nodes.values()) for listed in ranks.affinities]
    bound = "each rank on its GPU's" if max(spread) == 1 else "ranks may run on several"
    return f"{len(nodes)} NUMA nodes, {bound}"


def nvidia_topology() -> str:
    """What ``nvidia-smi topo -m`` prints; nothing where it does not run."""
    try:
        return subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def shared_memory(args: Namespace, ranks: Ranks, on_cpu: bool, size: Callable[[], int]) -> str:
    """/dev/shm has room for NCCL, and for the batches that data-loader workers hand to their ranks."""
    needs = {}
    if not on_cpu and ranks.here > 1:
        needs["NCCL (NVIDIA's --shm-size=1g)"] = NCCL_SHARED_MEMORY
    if args.num_workers:
        tokens = args.micro_batch_size * args.seq_length
        batch = tokens * (_TOKEN_BYTES + (args.seq_length if args.create_attention_mask_in_dataloader else 0))
        needs[f"{args.num_workers} data-loader workers a rank"] = ranks.here * args.num_workers * _PREFETCHED * batch
    if not needs:
        raise Skipped("neither NCCL nor data-loader workers")
    text = f"/dev/shm has {shown_size(size())}; " + ", ".join(
        f"{shown_size(need)} for {name}" for name, need in needs.items()
    )
    if size() < sum(needs.values()):
        raise Doubt(f"{text}: expected their sum (a container's --shm-size, or its --ipc=host)")
    return text


def open_files(ranks: Ranks, host: Host) -> str:
    """The soft limit of open files, of each process."""
    limit, expected = host.soft_limit("Max open files"), _FILES + _FILES_A_RANK * ranks.world_size
    text = f"{limit:g} a process"
    if limit < expected:
        raise Doubt(
            f"{text}: expected {expected}, {_FILES} and {_FILES_A_RANK} for each rank of the job (ulimit -n {expected})"
        )
    return text


def locked_memory(host: Host) -> str:
    """No limit to it where there are RDMA adapters, which pin what they send from and receive into."""
    adapters = host.rdma_adapters()
    if not adapters:
        raise Skipped("no InfiniBand or RoCE adapter")
    limit, text = host.soft_limit("Max locked memory"), f"{len(adapters)} RDMA adapter{'s' * (len(adapters) > 1)}"
    if limit != float("inf"):
        raise Doubt(
            f"{text}, and {shown_size(int(limit))} of memory may be locked: expected no limit (ulimit -l unlimited; "
            "slurmd's own: LimitMEMLOCK=infinity)"
        )
    return f"{text}, no limit"


def _of(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)}"
