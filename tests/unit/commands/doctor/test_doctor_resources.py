"""What a node gives its ranks, as ``sla-doctor`` reads it from files, and what it makes of that."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sla_megatron.commands.doctor import node_checks, resources
from sla_megatron.commands.doctor.finding import Doubt, Skipped, found
from sla_megatron.commands.doctor.host import Host, cores_of, gpu_cores
from sla_megatron.commands.doctor.resources import Ranks

LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max open files            1024                 524288               files
Max locked memory         8388608              unlimited            bytes
Max pending signals       96000                96000                signals
"""

Node = Callable[..., Host]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node whose /proc and /sys are files of the test: by name, beside those that every node has."""

    def make(environment: dict[str, str] | None = None, **files: str) -> Host:
        usual = {
            "proc/self/status": "VmRSS:\t 1048576 kB\nCpus_allowed:\tff\nCpus_allowed_list:\t0-7\n",
            "proc/meminfo": "MemTotal:       67108864 kB\nMemFree:  1 kB\n",
            "proc/self/limits": LIMITS,
            "proc/self/cgroup": "0::/\n",
        }
        for name, text in (usual | {name.replace("__", "/"): text for name, text in files.items()}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Host(tmp_path, environment or {})

    return make


def bound(*affinities: str, world_size: int = 0) -> Ranks:
    return Ranks(affinities, world_size or len(affinities))


def test_this_machine_is_read_as_the_kernel_has_it() -> None:
    """By other ways to the same figures: the scheduler's own call, getrlimit, sysconf."""
    import os
    import resource

    host = Host(environment={})
    assert cores_of(host.affinity()) == os.sched_getaffinity(0)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host.memory()["machine"] == pytest.approx(pages, rel=0.01)
    assert 0 < host.resident() <= pages
    for name, kind in (("Max open files", resource.RLIMIT_NOFILE), ("Max locked memory", resource.RLIMIT_MEMLOCK)):
        limit = resource.getrlimit(kind)[0]
        assert host.soft_limit(name) == (float("inf") if limit == resource.RLIM_INFINITY else limit)


@pytest.mark.parametrize(
    ("environment", "files", "cores", "memory"),
    [
        ({}, {}, {"affinity": 8}, {"machine": 64 << 30}),
        (
            {"SLURM_CPUS_ON_NODE": "4", "SLURM_MEM_PER_CPU": "2048"},
            {},
            {"affinity": 8, "SLURM_CPUS_ON_NODE": 4},
            {"machine": 64 << 30, "SLURM_MEM_PER_CPU": 8 << 30},
        ),
        # --mem=0 is all of it.
        ({"SLURM_MEM_PER_NODE": "0"}, {}, {"affinity": 8}, {"machine": 64 << 30}),
        (
            {"SLURM_MEM_PER_NODE": "512"},
            {},
            {"affinity": 8},
            {"machine": 64 << 30, "SLURM_MEM_PER_NODE": 512 << 20},
        ),
        # Version 2: the group above is the narrower one.
        (
            {},
            {
                "proc__self__cgroup": "0::/job_7/step_0\n",
                "sys__fs__cgroup__job_7__cpu.max": "150000 100000\n",
                "sys__fs__cgroup__job_7__step_0__cpu.max": "max 100000\n",
                "sys__fs__cgroup__job_7__memory.max": "1073741824\n",
                "sys__fs__cgroup__job_7__step_0__memory.max": "max\n",
            },
            {"affinity": 8, "control group": 1.5},
            {"machine": 64 << 30, "control group": 1 << 30},
        ),
        # Version 1, two controllers in one mount; without a limit memory has the largest number of pages.
        (
            {},
            {
                "proc__self__cgroup": "5:memory:/slurm/job_7\n4:cpu,cpuacct:/slurm\n0::/\n",
                "sys__fs__cgroup__memory__slurm__job_7__memory.limit_in_bytes": "2147483648\n",
                "sys__fs__cgroup__memory__memory.limit_in_bytes": "9223372036854771712\n",
                "sys__fs__cgroup__cpu,cpuacct__slurm__cpu.cfs_quota_us": "400000\n",
                "sys__fs__cgroup__cpu,cpuacct__slurm__cpu.cfs_period_us": "100000\n",
            },
            {"affinity": 8, "control group": 4},
            {"machine": 64 << 30, "control group": 2 << 30},
        ),
    ],
)
def test_what_limits_cores_and_memory(
    node: Node, environment: dict[str, str], files: dict[str, str], cores: dict[str, float], memory: dict[str, int]
) -> None:
    host = node(environment, **files)
    assert (host.cores(), host.memory()) == (cores, memory)


@pytest.mark.parametrize(
    ("ranks", "environment", "expected"),
    [
        (bound(*["0-7"] * 4), {}, ("ok", "8 cores by affinity for 4 ranks")),
        (
            bound(*["0-7"] * 4),
            {"SLURM_CPUS_ON_NODE": "4"},
            (
                "warn",
                "4 cores by SLURM_CPUS_ON_NODE for 4 ranks: expected 8, 2 a rank (--cpus-per-task, or --exclusive)",
            ),
        ),
        # Each has its own; this process alone sees two.
        (bound("0-1", "2-3"), {}, ("ok", "4 cores by affinity for 2 ranks")),
        (bound("0", "0"), {}, ("warn", "1 core by affinity for 2 ranks: expected 4, 2 a rank")),
    ],
)
def test_cores(node: Node, ranks: Ranks, environment: dict[str, str], expected: tuple[str, str]) -> None:
    finding = found("cores", resources.cores, ranks, node(environment))
    assert (finding.status, finding.text.startswith(expected[1])) == (expected[0], True), finding


def saving(monkeypatch: pytest.MonkeyPatch, **changes: object) -> Namespace:
    """A job of a thousand million parameters in bf16, of which Adam keeps two moments and a master weight in fp32."""
    monkeypatch.setattr(resources, "parameter_count", lambda args, vocabulary: 10**9)
    settings = {"save": "x", "async_save": False, "no_save_optim": False, "optimizer": "adam"}
    return Namespace(**settings | {"params_dtype": torch.bfloat16, "use_distributed_optimizer": True} | changes)


@pytest.mark.parametrize(
    ("changes", "megabytes", "on_cpu", "expected"),
    [
        # 14 GB over 16 ranks: 7 GB are of the 8 here, which have a GiB each.
        ({}, 0, False, ("ok", "68.7 GB by machine; 8.59 GB of 8 ranks at start and 7 GB of a checkpoint while it is")),
        ({}, 15_000, False, ("ok", "15.7 GB by SLURM_MEM_PER_NODE")),
        (
            {"async_save": True},
            14_000,
            False,
            (
                "warn",
                "14.7 GB by SLURM_MEM_PER_NODE; 8.59 GB of 8 ranks at start and 7 GB of a checkpoint while training "
                "goes on: expected 15.6 GB or more (--mem=0",
            ),
        ),
        ({"save": None}, 14_000, False, ("ok", "14.7 GB by SLURM_MEM_PER_NODE; 8.59 GB of 8 ranks at start")),
        ({"save": None}, 14_000, True, ("warn", "14.7 GB by SLURM_MEM_PER_NODE; 8.59 GB of 8 ranks at start and 7 GB")),
    ],
)
def test_memory(
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    megabytes: int,
    on_cpu: bool,
    expected: tuple[str, str],
) -> None:
    host, ranks = node({"SLURM_MEM_PER_NODE": str(megabytes)}), bound(*["0-7"] * 8, world_size=16)
    finding = found("memory", resources.memory, saving(monkeypatch, **changes), 1000, ranks, on_cpu, host)
    assert (finding.status, finding.text[: len(expected[1])]) == expected


#: As ``nvidia-smi topo -m`` writes it: two sockets with adapters, titles underlined, cores of both hyperthreads.
TWO_SOCKETS = """\
\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPXB\t0-3,8-11\t0\t\tN/A
GPU1\tNV18\t X \tSYS\t4-7,12-15\t1\t\tN/A
NIC0\tPXB\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)

NIC Legend:

  NIC0: mlx5_0
"""
#: An older driver's, with blanks and without NUMA nodes.
OLDER = """\
        GPU0    GPU1    mlx4_0  CPU Affinity
GPU0     X      PIX     PHB     0-9,20-29
GPU1    PIX      X      SYS     10-19,30-39
mlx4_0  PHB     SYS      X
"""
#: Cores of the sockets in turns.
IN_TURNS = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tSYS\t0,2,4\t0\nGPU1\tSYS\t X \t1,3,5\t1\n"
#: A virtual machine's, which hides it.
HIDDEN = "\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t\tN/A\n"


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        (TWO_SOCKETS, [{0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}]),
        (OLDER, [{*range(10), *range(20, 30)}, {*range(10, 20), *range(30, 40)}]),
        (IN_TURNS, [{0, 2, 4}, {1, 3, 5}]),
        (HIDDEN, [set()]),
        ("", []),
        ("Failed to initialize NVML: Driver/library version mismatch\n", []),
    ],
)
def test_which_cores_are_near_which_gpu(topology: str, expected: list[set[int]]) -> None:
    assert gpu_cores(topology) == expected


_NUMA = {"sys__devices__system__node__node0__cpulist": "0-3,8-11\n"}
_BOTH = _NUMA | {"sys__devices__system__node__node1__cpulist": "4-7,12-15\n"}


@pytest.mark.parametrize(
    ("ranks", "nodes", "topology", "expected"),
    [
        (bound("0-3", "4-7"), _BOTH, TWO_SOCKETS, ("ok", "2 NUMA nodes, each rank on its GPU's")),
        (bound("0-15", "0-15"), _BOTH, TWO_SOCKETS, ("ok", "2 NUMA nodes, ranks may run on several")),
        (
            bound("4-7", "0-3"),
            _BOTH,
            TWO_SOCKETS,
            ("warn", "local rank 0 has cores 4-7, its GPU is near 0-3,8-11 (and 1 more): expected cores of the GPU's"),
        ),
        (bound("4-7"), _NUMA, TWO_SOCKETS, ("skip", "one NUMA node")),
        (bound("4-7"), _BOTH, HIDDEN, ("skip", "2 NUMA nodes; nvidia-smi topo -m does not say")),
    ],
)
def test_cores_near_the_gpus(
    node: Node, ranks: Ranks, nodes: dict[str, str], topology: str, expected: tuple[str, str]
) -> None:
    finding = found("numa", resources.numa, ranks, node(**nodes), lambda: topology)
    assert (finding.status, finding.text[: len(expected[1])]) == expected


@pytest.mark.parametrize(
    ("changes", "on_cpu", "size", "expected"),
    [
        ({"num_workers": 0}, False, 2 << 30, ("ok", "/dev/shm has 2.15 GB; 1.07 GB for NCCL")),
        (
            {"num_workers": 0},
            False,
            64 << 20,
            ("warn", "/dev/shm has 67.1 MB; 1.07 GB for NCCL (NVIDIA's --shm-size"),
        ),
        # Two ranks, two workers, two batches: 8 of 2 x 4096 tokens of 28 bytes.
        (
            {"num_workers": 2},
            True,
            2 << 30,
            ("ok", "/dev/shm has 2.15 GB; 1.84 MB for 2 data-loader workers a rank"),
        ),
        # Masks of 4096 x 4096 beside them.
        (
            {"num_workers": 2, "create_attention_mask_in_dataloader": True},
            True,
            64 << 20,
            ("warn", "/dev/shm has 67.1 MB; 270 MB for 2 data-loader workers a rank: expected their sum"),
        ),
        ({"num_workers": 0}, True, 1, ("skip", "neither NCCL nor data-loader workers")),
    ],
)
def test_shared_memory(changes: dict[str, object], on_cpu: bool, size: int, expected: tuple[str, str]) -> None:
    settings = {"micro_batch_size": 2, "seq_length": 4096, "create_attention_mask_in_dataloader": False}
    args = Namespace(**settings | changes)
    finding = found("shm", resources.shared_memory, args, bound("0-7", "0-7"), on_cpu, lambda: size)
    assert (finding.status, finding.text[: len(expected[1])]) == expected


def test_open_files_and_locked_memory(node: Node) -> None:
    """The process's own soft limits; memory is locked where there are RDMA adapters."""
    few, many = bound("0-7", world_size=128), bound("0-7", world_size=129)
    assert resources.open_files(few, node()) == "1024 a process"
    with pytest.raises(Doubt, match=r"1024 a process: expected 1028, 512 and 4 for each rank of the job \(ulimit -n"):
        resources.open_files(many, node())
    with pytest.raises(Skipped, match="no InfiniBand or RoCE adapter"):
        resources.locked_memory(node())
    adapter = {"sys__class__infiniband__mlx5_0__node_type": "1: CA\n"}
    with pytest.raises(Doubt, match="1 RDMA adapter, and 8.39 MB of memory may be locked: expected no limit"):
        resources.locked_memory(node(**adapter))
    unlimited = LIMITS.replace("8388608  ", "unlimited")
    assert resources.locked_memory(node(proc__self__limits=unlimited, **adapter)) == "1 RDMA adapter, no limit"


def test_what_cannot_be_read_excludes_no_node(node: Node) -> None:
    """No line of these is a fault, whatever the kernel or Slurm say."""
    odd = node({"SLURM_CPUS_ON_NODE": "many", "SLURM_MEM_PER_NODE": "64G"}, proc__self__limits="Max open files none\n")
    findings = node_checks._resources(Namespace(save=None), None, bound("0-7"), True, odd)
    assert [each.check for each in findings] == ["cores", "memory", "numa", "shm", "files", "memlock"]
    assert {each.status for each in findings} <= {"ok", "skip", "warn"}
    assert [each.check for each in findings if each.status == "warn"] == ["cores", "memory", "shm", "files"]
