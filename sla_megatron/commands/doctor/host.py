"""What a node gives a job, as the kernel and Slurm say it: cores, memory, limits.  Pure Python, read from files.

What limits a figure has a name each: the machine, the control groups that this process is in (both versions, with all
groups above), the process's own limits, and what Slurm says in the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Control groups of version 1 write "no limit" as the largest number of pages.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Host:
    """This node, as the process that asks sees it.

    Attributes:
        root: where ``proc``, ``sys`` and ``dev`` are.
        environment: Slurm's variables are there.
    """

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def affinity(self) -> str:
        """The cores that this process may run on, as the kernel lists them: ``0-3,8``."""
        return self._status("Cpus_allowed_list")

    def cores(self) -> dict[str, float]:
        """Cores, by what limits them."""
        found: dict[str, float] = {"affinity": len(cores_of(self.affinity()))}
        quotas = [quota for quota in self._cpu_quotas() if quota is not None]
        if quotas:
            found["control group"] = min(quotas)
        if given := self.environment.get("SLURM_CPUS_ON_NODE"):
            found["SLURM_CPUS_ON_NODE"] = int(given)
        return found

    def memory(self) -> dict[str, int]:
        """Bytes, by what limits them."""
        total = re.search(r"^MemTotal:\s+(\d+) kB", self._read("proc/meminfo"), re.MULTILINE)
        found = {"machine": int(total[1]) << 10} if total else {}
        limits = [
            int(text) for text in self._of_groups("memory", "memory.max", "memory.limit_in_bytes") if text != "max"
        ]
        limits = [limit for limit in limits if limit < _NO_LIMIT]
        if limits:
            found["control group"] = min(limits)
        # Slurm's are megabytes; 0 is all that the node has.
        for name, times in _MEMORY.items():
            given = int(self.environment.get(name) or 0) * int(self.environment.get(times) or 0 if times else 1)
            if given:
                found[name] = given << 20
        return found

    def resident(self) -> int:
        """Bytes that this process has in memory."""
        return int(self._status("VmRSS").removesuffix(" kB") or 0) << 10

    def soft_limit(self, name: str) -> float:
        """This process's limit of ``name``, as ``/proc/self/limits`` calls it; infinity where there is none."""
        line = re.search(rf"^{re.escape(name)}\s+(\S+)\s", self._read("proc/self/limits"), re.MULTILINE)
        return float("inf") if line is None or line[1] == "unlimited" else int(line[1])

    def rdma_adapters(self) -> list[str]:
        """InfiniBand and RoCE adapters."""
        folder = self.root / "sys/class/infiniband"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def numa_nodes(self) -> dict[int, set[int]]:
        """The cores of each NUMA node."""
        found = {}
        for path in sorted((self.root / "sys/devices/system/node").glob("node[0-9]*")):
            found[int(path.name.removeprefix("node"))] = cores_of(self._read(f"{path.relative_to(self.root)}/cpulist"))
        return {node: cores for node, cores in found.items() if cores}

    def shared_memory(self) -> int:
        """Bytes that ``/dev/shm`` can hold."""
        found = os.statvfs(self.root / "dev/shm")
        return found.f_frsize * found.f_blocks

    def _status(self, name: str) -> str:
        line = re.search(rf"^{name}:\s+(.*)$", self._read("proc/self/status"), re.MULTILINE)
        return line[1] if line else ""

    def _cpu_quotas(self) -> Iterator[float | None]:
        """Cores that the groups of this process have, as time a period."""
        for text in self._of_groups("cpu", "cpu.max", None):
            quota, period = text.split()
            yield None if quota == "max" else int(quota) / int(period)
        periods = self._of_groups("cpu", None, "cpu.cfs_period_us")
        for quota, period in zip(self._of_groups("cpu", None, "cpu.cfs_quota_us"), periods, strict=False):
            yield None if int(quota) < 0 else int(quota) / int(period)

    def _of_groups(self, controller: str, second: str | None, first: str | None) -> Iterator[str]:
        """What the files of this process's control groups say, from its own to the root; ``second`` and ``first`` are
        their names in version 2 and 1."""
        for line in self._read("proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                mounts, name = ("", "unified"), second
            elif controller in controllers.split(","):
                mounts, name = (controller, controllers), first
            else:
                continue
            parts = Path(path).parts[1:]
            for length in range(len(parts), -1, -1):
                for mount in mounts:
                    text = self._read(str(Path("sys/fs/cgroup", mount, *parts[:length], name or ""))) if name else ""
                    if text:
                        yield text.strip()
                        break

    def _read(self, path: str) -> str:
        try:
            return (self.root / path).read_text()
        except OSError:
            return ""


#: Slurm's memory in megabytes, and of how many there is as much.
_MEMORY = {
    "SLURM_MEM_PER_NODE": "",
    "SLURM_MEM_PER_CPU": "SLURM_CPUS_ON_NODE",
    "SLURM_MEM_PER_GPU": "SLURM_GPUS_ON_NODE",
}


def cores_of(listed: str) -> set[int]:
    """``0-3,8`` as numbers."""
    found: set[int] = set()
    for part in filter(None, listed.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def gpu_cores(topology: str) -> list[set[int]]:
    """The cores that ``nvidia-smi topo -m`` says are near each GPU, in the order of the GPUs; empty where it says none.

    The table has a column for every GPU and network adapter before that of the cores; its titles may be underlined.
    """
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in topology.splitlines()]
    before = next((words.index("CPU") for words in lines if "CPU" in words and "Affinity" in words), None)
    if before is None:
        return []
    found: dict[int, set[int]] = {}
    for words in lines:
        if words and (gpu := re.fullmatch(r"GPU(\d+)", words[0])) and "Affinity" not in words:
            cell = words[before + 1] if len(words) > before + 1 else ""
            found[int(gpu[1])] = cores_of(cell) if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", cell) else set()
    return [found[gpu] for gpu in sorted(found)]
