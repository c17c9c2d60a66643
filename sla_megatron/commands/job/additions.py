"""What a chain of attempts adds to the flags of a run: one W&B run, one TensorBoard folder, one data cache.

Each only where the training script takes it and the user has not said another.
"""

from __future__ import annotations

import os
import secrets
import string
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...common.files import read_json, write_json
from .data_cache import DATA_CACHE
from .data_flags import names_data
from .flags import JobError
from .given import values

#: In the run's folder.
WANDB, TENSORBOARD = "wandb.json", "tensorboard"

# Megatron catches a missing package alone; one that does not fit the others here would end the run.
_WRITER = "import tensorboard.compat.proto.event_pb2, tensorboard.summary.writer.event_file_writer"


@dataclass
class Additions:
    """Variables for the ranks, and flags before the user's own."""

    environment: dict[str, str] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)


def additions(run: Path, flags: Sequence[str], takes: Callable[[str], bool]) -> Additions:
    """What is added to ``flags`` of the run in the folder ``run``.

    Args:
        run: where it lies on a file system that all nodes share.
        flags: all of the run's.
        takes: whether the training script knows a flag, such as ``--tensorboard-dir``.

    Raises:
        JobError: where the W&B run's name, kept in ``run``, cannot be read.
        OSError: where it cannot be kept.
    """
    found, run = Additions(), run.absolute()

    def add(flag: str, value: Path, possible: Callable[[], bool] = lambda: True) -> None:
        if values(flags, flag) is None and takes(flag) and possible():
            found.flags += [flag, str(value)]

    asked = values(flags, "--wandb-project") not in (None, [], [""]) or os.environ.get("WANDB_PROJECT")
    if asked and os.environ.get("WANDB_RESUME") != "never":
        found.environment |= _wandb(run)
        # Megatron passes a folder of its own, which counts more than WANDB_DIR.
        add("--wandb-save-dir", Path(os.environ.get("WANDB_DIR") or run))
    # Without it Megatron sends nothing to W&B either (training_log in megatron/training/training.py).
    add("--tensorboard-dir", run / TENSORBOARD, _can_write_events)
    # These want a cache that is there; and Megatron's mock corpus would be cached as well, whatever its size.
    if names_data(flags) and not any(
        values(flags, flag) is not None
        for flag in ("--mock-data", "--dataloader-fast-cache-load", "--dataloader-defer-npy-index-mmap")
    ):
        add("--data-cache-path", run / DATA_CACHE)
    return found


def _wandb(run: Path) -> dict[str, str]:
    """The same run at each attempt; what the user has set counts."""
    name, job = _kept_names(run)
    own = {"WANDB_RUN_ID": name, "WANDB_RESUME": "allow", "WANDB_DIR": str(run)}
    found = {name: value for name, value in own.items() if not os.environ.get(name)}
    # Megatron puts it into the run's configuration, where W&B takes no second value: another would end the trainer.
    # Ranks would see the job's name or the step's, as Slurm's version has it.
    return found | ({"SLURM_JOB_NAME": job} if job and "WANDB_RUN_ID" in found else {})


def _kept_names(run: Path) -> tuple[str, str | None]:
    """The W&B run's and the first job's, made once and kept in ``run``.

    The run's is not made of the folder's: W&B takes no run anew that was deleted there.
    """
    path = run / WANDB
    try:
        kept = read_json(path)
        if kept is None:
            kept = {"run_id": _new_id(), "job_name": None}
        name, job = kept["run_id"], kept["job_name"]
        if not (name and isinstance(name, str) and isinstance(job, str | None)):
            raise ValueError(f"run_id {name!r}, job_name {job!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"{path} cannot be read ({error}): expected it as it was, or moved away") from error
    # None of a command that was only shown, outside of a job; where there is no folder yet, it leaves none.
    job = job or os.environ.get("SLURM_JOB_NAME")
    found = {"run_id": name, "job_name": job}
    if run.is_dir() and (found != kept or not path.exists()):
        write_json(path, found)
    return name, job


def _new_id() -> str:
    """As wandb makes them."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def _can_write_events() -> bool:
    """Whether this Python, the ranks', can write TensorBoard's files."""
    try:
        done = subprocess.run([sys.executable, "-c", _WRITER], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
