"""A grid as one Slurm job array, a task for each run that is not finished."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ...attention.sla_config import compact_ranges
from ...common.files import write_whole
from .errors import SweepError
from .flag_words import ROOT
from .grid import Run
from .results_folder import SweepFolder

SCRIPT = ROOT / "launch" / "sweep.sbatch"

#: Named overrides of launch/slurm.sbatch that hold for a sweep.  They travel as words: sbatch's --export, which a site
#: may set for all, keeps what is in the environment from the job.
_OVERRIDES = (
    *("SETUP", "STAGE", "LAUNCH", "NPROC", "BIND", "MAX_FAILURES", "SAVE_SECONDS", "HEALTH_CHECK", "MAX_EXCLUDED"),
    *("DOCTOR", "CHECK", "MASTER_ADDR", "MASTER_PORT"),
)


def command(
    grid: Path, sweep: SweepFolder, runs: Sequence[Run], limit: int | None, options: Sequence[str], more: Sequence[str]
) -> list[str] | None:
    """The ``sbatch`` command for what is not finished; None where nothing is left.

    Args:
        grid: the file, whose copy in the folder the tasks read.
        sweep: where results go.
        runs: of the grid; a task's number is a run's place in it.
        limit: tasks at a time.
        options: of sbatch, from the user; they come last and so win.
        more: options of ``sla-sweep task``, such as ``--device cpu``.
    """
    left = [number for number, run in enumerate(runs) if not sweep.finished(run)]
    if not left:
        return None
    array = compact_ranges(left) + (f"%{limit}" if limit else "")
    out = sweep.path.absolute()
    found = ["sbatch", f"--array={array}", f"--job-name={out.name}", f"--output={out}/slurm/%A_%a.log", *options]
    passed = {"SLA_ROOT": str(ROOT), "PYTHON": os.environ.get("PYTHON") or sys.executable}
    passed |= {name: os.environ[name] for name in _OVERRIDES if os.environ.get(name)}
    words = [f"{name}={value}" for name, value in passed.items()]
    return [*found, str(SCRIPT), *words, str(copy_of(grid, sweep)), "--out", str(out), *more]


def copy_of(grid: Path, sweep: SweepFolder) -> Path:
    """Where the grid is kept as it was submitted: an edit must not renumber the tasks that wait."""
    return sweep.path.absolute() / "grids" / f"{hashlib.sha256(grid.read_bytes()).hexdigest()[:12]}.yaml"


def submit(grid: Path, sweep: SweepFolder, words: Sequence[str]) -> str:
    """Write the copy, call sbatch; what it printed.

    Raises:
        SweepError: where sbatch is missing or refuses.
    """
    for folder in ("grids", "slurm"):
        (sweep.path / folder).mkdir(exist_ok=True)
    copy = copy_of(grid, sweep)
    if not copy.exists():
        write_whole(copy, grid.read_bytes(), durable=True)
    try:
        done = subprocess.run(list(words), capture_output=True, text=True)
    except OSError as error:
        raise SweepError(f"sbatch: {error.strerror}: expected Slurm's commands on this machine") from error
    if done.returncode:
        raise SweepError(f"sbatch refuses: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def shown(words: Sequence[str]) -> str:
    """As a shell reads it."""
    return shlex.join(words)
