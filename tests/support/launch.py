"""Launch real gloo ranks for a test, one process each, and collect what they found."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .zygote import ForkedRank, Zygote

ROOT = Path(__file__).resolve().parents[2]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that the system hands out by itself: gloo takes many of these."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


#: What Megatron and torch leave in this process, when a test imports them; a rank has what the user set of it, such as
#: a choice of Transformer Engine's kernels.
_LEFT_BEHIND = ("NVTE_", "TORCHINDUCTOR_")
_OF_THE_USER = {name: value for name, value in os.environ.items() if name.startswith(_LEFT_BEHIND)}

#: Behind the repository: such as another Megatron than the one that is installed.
_FURTHER_PATHS = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(ROOT))]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank, and the repository on the path."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", *_LEFT_BEHIND))}
    return {
        **inherited,
        **_OF_THE_USER,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *_FURTHER_PATHS]),
        "PYTHONWARNINGS": "ignore",
    }


Rank = subprocess.Popen | ForkedRank


def start_ranks(command: Sequence[str], world_size: int, log_folder: Path) -> list[Rank]:
    """Start ``python <command>`` once for each rank; rank ``r`` writes to ``log_folder/rank<r>.log``."""
    log_folder.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    return [
        _start(command, rank_environment(rank, world_size, port), log_folder / f"rank{rank}.log")
        for rank in range(world_size)
    ]


def _start(command: Sequence[str], environment: dict[str, str], log: Path) -> Rank:
    """A rank in a session of its own, so that it can be ended together with the helpers that Megatron starts for it.

    A test's worker is forked from a process that has imported Megatron, unless a GPU may be used or its environment is
    not that process's.
    """
    if command[0] == "-m" and command[1].startswith("tests.support.") and not _GPU.exists():
        zygote = _zygote()
        if zygote.serves(environment):
            return zygote.fork(command[1], list(command[2:]), environment, log)
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


#: CUDA does not survive a fork.
_GPU = Path("/dev/nvidiactl")

#: Before any test changes it.
_ENVIRONMENT = rank_environment(0, 1, 0)


@functools.cache
def _zygote() -> Zygote:
    """Started when the first group of ranks is, for the whole session."""
    return Zygote(_ENVIRONMENT, ROOT)


def wait_for_ranks(ranks: Sequence[Rank], log_folder: Path, timeout: float) -> None:
    """Wait for all to end well.  If one fails or time runs out, the others are ended and its log's tail is raised."""
    deadline = time.monotonic() + timeout
    try:
        while any(rank.poll() is None for rank in ranks):
            failed = [rank.poll() not in (None, 0) for rank in ranks]
            if any(failed) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        kill_ranks(ranks)
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        # A rank that was killed here (-9) only waited for the one that failed.
        first = next((i for i, code in enumerate(codes) if code not in (0, -9)), codes.index(-9) if -9 in codes else 0)
        tail = (log_folder / f"rank{first}.log").read_text()[-6000:]
        raise AssertionError(f"ranks ended with {codes}; rank {first}:\n{tail}")


def kill_ranks(ranks: Sequence[Rank]) -> None:
    """End, at once, what is left of each rank and its helper processes."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)


def run_worker(worker: str, request: Any, world_size: int, folder: Path, timeout: float = 500) -> list[Any]:
    """Run ``tests/support/<worker>.py`` on ``world_size`` ranks with ``request`` (JSON); each rank's JSON answer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "request.json").write_text(json.dumps(request, default=str))
    ranks = start_ranks(["-m", f"tests.support.{worker}", str(folder)], world_size, folder)
    wait_for_ranks(ranks, folder, timeout)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("answer*.json"), key=lambda path: path.name)]
