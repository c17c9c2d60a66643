"""Jobs of launch/slurm.sbatch on a real Slurm: what is submitted, and what is seen of it."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from .launch import ROOT
from .runs import argv
from .slurm import Cluster

ITERATIONS, SAVE_INTERVAL = 30, 5


FLAGS = [
    *argv(
        sla=True,
        sla_skip_distance=2,
        hidden_size=64,
        seq_length=64,
        max_position_embeddings=64,
        global_batch_size=16,
        train_iters=ITERATIONS,
        save_interval=SAVE_INTERVAL,
        pipeline_model_parallel_size=2,
        no_create_attention_mask_in_dataloader=True,
    ),
    *("--device", "cpu"),
]


#: Enough iterations for what is done to the tasks meanwhile; nothing is saved but when a signal comes, and at the end.
TASK_ITERATIONS = 250


TASK_FLAGS = [
    *argv(train_iters=TASK_ITERATIONS, save_interval=1000, lr_decay_iters=900, tensor_model_parallel_size=1),
    *("--eval-iters", "0", "--device", "cpu"),
]


def submit(slurm: Cluster, run: Path, *flags: str, nodes: int = 2, **environment: str) -> str:
    """Submit the unmodified script: the job's number."""
    names = {"RUN_DIR": str(run), "PYTHON": sys.executable, "NPROC": "2"} | environment
    options = ["--parsable", f"--nodes={nodes}", "--job-name=gpt", f"--output={run}.log"]
    return slurm.command("sbatch", *options, "launch/slurm.sbatch", *flags, cwd=ROOT, **names).strip()


def shown(slurm: Cluster, run: Path) -> dict[str, Any]:
    """What ``sla-job show`` says of a run, where Slurm's commands are this cluster's."""
    command = [sys.executable, "-m", "sla_megatron.commands.job.cli", "show", "--run", run, "--json"]
    return json.loads(slurm.command(*command, cwd=ROOT, PYTHONPATH=str(ROOT)))


def log(run: Path) -> str:
    path = Path(f"{run}.log")
    return path.read_text() if path.exists() else ""


class Watch:
    """What a job's log says after something was done to it."""

    def __init__(self, slurm: Cluster, job: str, run: Path) -> None:
        self.slurm, self.job, self.run, self.seen = slurm, job, run, 0

    def until(self, pattern: str, seconds: float = 240) -> re.Match[str]:
        """Wait for ``pattern`` in what was logged since the last match, and return it."""
        deadline = time.monotonic() + seconds
        ended = False
        while (found := re.compile(pattern).search(log(self.run), self.seen)) is None:
            late = time.monotonic() > deadline
            assert not (late or ended), f"no {pattern!r} in\n{log(self.run)[self.seen :][-6000:]}"
            # What it wrote before it ended is read once more.
            ended = self.slurm.job(self.job).get("JobState") in ("COMPLETED", "FAILED", "CANCELLED")
            time.sleep(0.1)
        self.seen = found.end()
        return found

    def training(self) -> int:
        """Wait for the next iteration of a new attempt that is not its first."""
        self.until(r"sla-job: attempt \d+ of this run")
        first = int(self.until(r"iteration +(\d+)/ *\d+ .*lm loss")[1])
        return int(self.until(rf"iteration +({first + 1})/ *\d+ .*lm loss")[1])


def wrapper(folder: Path, training: str) -> str:
    """An interpreter that runs ``training``, a shell's line, in the place of torchrun."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/bash\n[[ "$*" != *torch.distributed.run* ]] || {{ {training}; }}\nexec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def crashes(folder: Path, status: int) -> str:
    """Training, as a shell's line, that fails with ``status`` on each node of its step, whichever comes to it first.

    Slurm ends the rest of a step once a task of it has failed: it would end some before they have said where they are,
    and srun's status is the greatest, which SIGTERM's 143 is.  So they wait for each other in ``folder``, deaf to it.
    """
    met = f"{folder}/$SLURM_JOB_ID.$SLURM_STEP_ID"
    says = f"echo crashing on $SLURMD_NODENAME; mkdir -p {met}/$SLURMD_NODENAME"
    together = f'until [ "$(ls {met} | wc -l)" = "$SLURM_STEP_NUM_NODES" ]; do sleep 0.1; done'
    return f"trap '' TERM; {says}; {together}; exit {status}"
