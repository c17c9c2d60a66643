"""``sla-job health``: one node, before each attempt."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from tempfile import NamedTemporaryFile

from ...common.flag_types import WITH_VALUE, count
from .arguments import add_run

HELP = "examine this node: GPUs, and whether the run's folder can be written"


def add_arguments(command: ArgumentParser) -> None:
    add_run(command)
    gpus = "GPUs that this node should have (default: 0)"
    command.add_argument("--gpus", type=count("--gpus", 0), default=0, metavar="N", help=gpus, **WITH_VALUE)


def run(args: Namespace) -> int:
    """What a node needs before a job is worth starting on it."""
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    faults = []
    if args.gpus:
        faults += _gpu_faults(args.gpus)
    try:
        with NamedTemporaryFile("w", prefix=f".probe.{node}.", dir=args.run) as probe:
            probe.write(node)
    except OSError as error:
        faults.append(f"{args.run} cannot be written: {error.strerror}")
    for fault in faults:
        print(f"sla-job: {node} is not healthy: {fault}", file=sys.stderr, flush=True)
    return 1 if faults else 0


def _gpu_faults(count: int) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return ["nvidia-smi is not there"]
    try:
        # It talks to each GPU: one that has fallen off the bus makes it fail, or hang.
        query = ["nvidia-smi", "--query-gpu=index,memory.total", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi: {error}"]
    return [] if len(listed) >= count else [f"{len(listed)} GPUs, {count} are needed"]
