"""Slurm's commands, called for a user who waits for what they say.  Only the standard library is imported."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from .errors import StartError


def require_slurm(otherwise: str = "") -> None:
    """Raise ``StartError`` where ``sbatch`` is not; ``otherwise`` says what may be done without it."""
    if shutil.which("sbatch") is None:
        raise StartError(f"sbatch: not found: expected Slurm's commands on this machine{otherwise}")


def sbatch(words: Sequence[str]) -> str:
    """Run an ``sbatch`` command; what it printed.  The job inherits no place in an array that this process may have.

    Raises:
        StartError: where sbatch is missing or refuses.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_ARRAY_")}
    try:
        done = subprocess.run(list(words), env=environment, capture_output=True, text=True)
    except OSError as error:
        raise StartError(f"sbatch: {error.strerror}: expected Slurm's commands on this machine") from error
    if done.returncode:
        raise StartError(f"sbatch refuses: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def waiting_or_running(jobs: Sequence[str]) -> list[str]:
    """Those of ``jobs`` that Slurm has not done with."""
    if not jobs:
        return []
    # It refuses a number that it has forgotten, if that is the only one.
    command = ["squeue", "--noheader", "--array-unique", "--format=%F", f"--jobs={','.join(jobs)}"]
    try:
        known = subprocess.run(command, capture_output=True, text=True).stdout.split()
    except OSError:
        return []
    return [job for job in jobs if job in known]


def cancel(jobs: Sequence[str]) -> None:
    """Cancel ``jobs``."""
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True)
