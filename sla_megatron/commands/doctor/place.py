"""Where this process stands in the job: its rank, its node, and whether a launcher started it."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

#: What torchrun, or a job script around srun, sets for each rank.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """One process.

    Attributes:
        rank, world_size, local_rank: as the launcher set them; 0, 1, 0 of a process that runs alone.
        node: the name by which the scheduler knows this node.
        launched: whether this is one of the job's ranks.
    """

    rank: int
    world_size: int
    local_rank: int
    node: str
    launched: bool

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """The place that ``environment`` says; it is a launcher's where all of :data:`LAUNCHED` are set."""
        node = environment.get("SLURMD_NODENAME") or socket.gethostname()
        if not all(environment.get(name) for name in LAUNCHED):
            return cls(0, 1, 0, node, launched=False)
        local = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or "0"
        return cls(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(local), node, launched=True)

    @property
    def examines_node(self) -> bool:
        """Whether this process does its node's checks."""
        return self.local_rank == 0


def slurm_nodes(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The nodes of the Slurm step, or else of the job, that this process is in; none where Slurm does not say."""
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not listed:
        return []
    try:
        # Slurm's own reading of lists such as gpu[01-04,07].
        done = subprocess.run(
            ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()
