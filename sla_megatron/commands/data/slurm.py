"""The tasks of a plan as one Slurm job array, and the merge as a job that waits for all of them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ...attention.sla_config import compact_ranges
from ...common import sbatch
from ...common.errors import StartError
from ...common.files import read_json, write_json
from .division import Plan
from .errors import DataError, file_errors

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "launch" / "data.sbatch"
_JOBS = "jobs.json"

#: Named overrides of launch/data.sbatch, and where the Hugging Face libraries keep what tasks read.  They travel as
#: words: sbatch's --export, which a site may set for all, keeps what is in the environment from the job.
_OVERRIDES = (
    *"SETUP MAX_RESTARTS CONTAINER_IMAGE CONTAINER_MOUNTS CONTAINER_OPTIONS".split(),
    *"HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE HF_DATASETS_CACHE HF_DATASETS_OFFLINE".split(),
)


def array_command(plan: Plan, limit: int | None, workers: int, options: Sequence[str]) -> list[str] | None:
    """The ``sbatch`` command for the tasks that are not finished; None where all are.

    Args:
        plan: whose tasks have the array's numbers.
        limit: tasks at a time.
        workers: processes of a task, for which cores are asked.
        options: of sbatch, from the user, which win.
    """
    left = plan.left()
    if not left:
        return None
    array = compact_ranges(left) + (f"%{limit}" if limit else "")
    asked = [f"--job-name={plan.job.prefix.name}", f"--cpus-per-task={workers}", f"--output={plan.logs}/%A_%a.log"]
    return ["sbatch", "--parsable", *asked, *options, f"--array={array}", *_script(plan, f"--workers={workers}")]


def merge_command(plan: Plan, array: str | None, fatal: bool, options: Sequence[str]) -> list[str]:
    """The ``sbatch`` command for the merge, which waits for the job ``array`` if there is one, however that ends."""
    asked = [f"--job-name={plan.job.prefix.name}-merge", f"--output={plan.logs}/merge_%j.log"]
    after = [f"--dependency=afterany:{array}"] if array else []
    error = f"--on-error={'fatal' if fatal else 'skip'}"
    return ["sbatch", "--parsable", *asked, *options, *after, *_script(plan, "--merge", error)]


def _script(plan: Plan, *more: str) -> list[str]:
    passed = {"SLA_ROOT": str(ROOT)}
    if os.environ.get("PYTHON") or not os.environ.get("CONTAINER_IMAGE"):
        passed["PYTHON"] = os.environ.get("PYTHON") or sys.executable
    passed |= {name: os.environ[name] for name in _OVERRIDES if os.environ.get(name)}
    return [str(SCRIPT), *(f"{name}={value}" for name, value in passed.items()), str(plan.folder), *more]


def require_idle(folder: Path) -> None:
    """Raise ``DataError`` while jobs that were submitted for this work before may still be at it."""
    try:
        jobs = (read_json(folder / _JOBS) or {}).get("jobs", [])
    except (OSError, ValueError):
        return
    if found := sbatch.waiting_or_running(jobs):
        raise DataError(
            f"{folder}: job {', '.join(found)} is at work there, or waits: expected its end, or scancel "
            + " ".join(found)
        )


def submit(plan: Plan, limit: int | None, workers: int, fatal: bool, options: Sequence[str]) -> list[str]:
    """Submit what is left of the plan: the numbers of the jobs, the merge's last.

    Raises:
        StartError: where sbatch is missing or refuses; then nothing stays submitted.
    """
    with file_errors(str(plan.logs)):
        plan.logs.mkdir(exist_ok=True)
    words = array_command(plan, limit, workers, options)
    jobs = [_number(sbatch.sbatch(words))] if words else []
    try:
        jobs.append(_number(sbatch.sbatch(merge_command(plan, jobs[0] if jobs else None, fatal, options))))
    except StartError:
        sbatch.cancel(jobs)
        raise
    with contextlib.suppress(FileNotFoundError):  # All of it may be done by now.
        write_json(plan.folder / _JOBS, {"jobs": jobs})
    return jobs


def _number(printed: str) -> str:
    """Of ``sbatch --parsable``: a cluster's name may be behind it."""
    return printed.splitlines()[-1].partition(";")[0]
