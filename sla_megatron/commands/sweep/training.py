"""One run: launched, followed, and its row written."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.checkpoint_folders import newest_complete, point_to, tracked
from ...common.environment import commit, machine
from ...common.files import write_json
from ...common.launchers import end_with_parent, stop
from .errors import RunFailed
from .flag_words import ROOT
from .grid import Run
from .results_folder import RunFolder, SweepFolder
from .training_log import LAUNCH_MARK, TrainingLog, read_log

_POLL_SECONDS = 0.2

Say = Callable[[str], None]
Progress = Callable[[Run, TrainingLog], None]


@dataclass(frozen=True)
class Launcher:
    """How training is started: a script of ``launch/``, and its overrides.

    ``keeps_checkpoints``: the script itself saves to ``CHECKPOINTS`` and goes on from the newest one there.
    """

    script: Path
    environment: Mapping[str, str]
    keeps_checkpoints: bool = False

    @classmethod
    def local(cls, processes: int | None = None) -> Launcher:
        """``launch/local.sh``, on this machine."""
        return cls(ROOT / "launch" / "local.sh", {"NPROC": str(processes)} if processes else {})

    @classmethod
    def slurm(cls) -> Launcher:
        """``launch/slurm.sbatch``, within a job: all of its nodes."""
        return cls(ROOT / "launch" / "slurm.sbatch", {"SLA_ROOT": str(ROOT)}, keeps_checkpoints=True)

    def command(self, run: Run, folder: RunFolder) -> list[str]:
        """The script with all of the run's flags."""
        where = ["--data-cache-path", str(folder.data_cache)]
        if self.keeps_checkpoints:
            # Megatron cannot end a run that saves without an interval.
            where += [] if run.shape.save_interval else ["--save-interval", str(run.iterations)]
        elif run.shape.save_interval:
            where += ["--save", str(folder.checkpoints), "--load", str(folder.checkpoints)]
        # The grid's flags last: it may have a --data-cache-path of its own.
        return ["bash", str(self.script), *where, *run.flags]

    def overrides(self, folder: RunFolder) -> dict[str, str]:
        """The environment of the script."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("PRESETS", "DRY_RUN")}
        inherited.setdefault("PYTHON", sys.executable)
        own = {"RUN_DIR": str(folder.path), "CHECKPOINTS": str(folder.checkpoints)}
        return inherited | own | dict(self.environment)


def train(sweep: SweepFolder, run: Run, launcher: Launcher, say: Say, progress: Progress) -> dict[str, Any]:
    """Train ``run``, or go on with it, and write its row, which is returned; a run that has one is not repeated.

    Args:
        sweep: where its folder is.
        run: of the grid.
        launcher: starts its training.
        say: receives lines for the user.
        progress: receives, a few times a second, what the log says so far.

    Raises:
        RunFailed: one line with the log's path.
        RunBusy: if another process is at it.
    """
    folder = sweep.run(run)
    with folder.locked(say) as lock:
        if not sweep.finished(run):
            sweep.begin(run)
            began = time.monotonic()
            # Training may have come to its end, but not to its row; a run's folder has one run's logs alone.
            log = _read(folder.log) if folder.log.is_file() else TrainingLog()
            if log.missing(run.iterations) is not None:
                log = _launch(run, folder, launcher, lock, say, progress)
            write_json(folder.row, _row(run, log) | {"attempt_seconds": round(time.monotonic() - began, 1)})
            shutil.rmtree(folder.data_cache, ignore_errors=True)
    return next(row for row in sweep.collect() if row["name"] == run.name)


def _launch(run: Run, folder: RunFolder, launcher: Launcher, lock: int, say: Say, progress: Progress) -> TrainingLog:
    """Train until the launcher ends; the whole log, which is complete."""
    if not launcher.keeps_checkpoints and run.shape.save_interval:
        _prepare_checkpoints(folder, say)
    # One that was being written when its run was killed would be read as if it were whole.
    shutil.rmtree(folder.data_cache, ignore_errors=True)
    status = _follow(run, folder, launcher, lock, progress)
    log = _read(folder.log)
    if status == 0 and launcher.keeps_checkpoints and run.iterations not in log.validation:
        # An attempt that saved all iterations did not come to the evaluation at the end.
        saved = ["--load", str(folder.checkpoints)]
        status = _follow(run, folder, Launcher.local(log.processes), lock, progress, saved)
        log = _read(folder.log)
    missing = log.missing(run.iterations)
    if status or missing:
        what = f"ended with status {status}" if status else f"ended with status 0, but of its log: {missing}"
        raise RunFailed(f"{run.name} {what}: {_reason(folder.log)} (log: {folder.log})")
    return log


def _prepare_checkpoints(folder: RunFolder, say: Say) -> None:
    """Have Megatron go on from the newest complete checkpoint; it would believe its tracker file."""
    newest, broken = newest_complete(folder.checkpoints)
    if newest is not None:
        point_to(folder.checkpoints, newest, broken, say)
        say(f"{folder.path.name}: going on from iteration {newest}")
    elif tracked(folder.checkpoints) is not None:
        raise RunFailed(
            f"{folder.checkpoints} had a checkpoint of iteration {tracked(folder.checkpoints)} and has no complete one "
            "now: expected it to be restored, or the folder removed to begin anew"
        )


def _follow(
    run: Run, folder: RunFolder, launcher: Launcher, lock: int, progress: Progress, more: Sequence[str] = ()
) -> int:
    """Start the launcher, report while it writes the log, and return its exit status."""
    command = [*launcher.command(run, folder), *more]
    with folder.log.open("a", buffering=1) as written:
        written.write(f"{LAUNCH_MARK}{shlex.join(command)}\n")
        process = subprocess.Popen(
            command,
            env=launcher.overrides(folder),
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            # Training that outlives this process keeps the run locked; what can be told to end, is.
            pass_fds=(lock,),
            preexec_fn=end_with_parent,
        )
    with _forwarding_signals(process), folder.log.open(errors="replace") as reader:
        log, rest = TrainingLog(), ""
        try:
            while True:
                ended = process.poll() is not None
                *lines, rest = (rest + reader.read()).split("\n")
                for line in lines:
                    log.read(line)
                progress(run, log)
                if ended:
                    return process.returncode
                time.sleep(_POLL_SECONDS)
        except BaseException:
            stop(process)
            raise


@contextlib.contextmanager
def _forwarding_signals(process: subprocess.Popen) -> Iterator[None]:
    """Within the block SIGUSR1 and SIGTERM, with which Slurm wants a job to save, go to ``process`` as well."""

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        if callable(before[number]):
            before[number](number, frame)

    before = {number: signal.signal(number, forward) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read(path: Path) -> TrainingLog:
    with path.open(errors="replace") as file:
        return read_log(line.rstrip("\n") for line in file)


def _reason(log: Path) -> str:
    """The line of the last launch's log that most likely says why."""
    lines = log.read_text(errors="replace").splitlines()
    begin = max((number for number, line in enumerate(lines) if line.startswith(LAUNCH_MARK)), default=0)
    said = [line.strip() for line in lines[begin + 1 :] if line.strip()]
    for line in said:
        if "sla-megatron: error:" in line or "sla-job: error:" in line:
            return line
    errors = [line for line in said if "Error: " in line and "ChildFailedError" not in line]
    return (errors or said or ["it printed nothing"])[0 if errors else -1][-300:]


def _row(run: Run, log: TrainingLog) -> dict[str, Any]:
    """What the finished run measured, with everything that it depends on."""
    shape = run.shape
    device = "cpu"
    if not log.on_cpu:
        # From a process of its own: asking takes memory of the GPU until the process ends.
        asked = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name(0))"]
        device = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"
    # Threads are those of this process, which did not train.
    where = {name: value for name, value in machine(device).items() if name not in ("device", "threads")}
    validation = log.validation[run.iterations]
    return {
        "name": run.name,
        "size": run.size,
        "context": shape.context,
        **run.setting.as_row(),
        "seed": run.seed,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "num_groups": shape.num_groups,
        "tokens": run.tokens,
        "iterations": run.iterations,
        "training_loss": log.training_loss(shape.log_interval),
        "validation_loss": validation,
        "perplexity": math.exp(validation),
        "tokens_per_second": run.tokens / run.iterations / log.seconds_per_iteration(),
        "seconds": round(log.seconds(), 3),
        "parameters": log.parameters,
        "processes": log.processes,
        "device": device,
        "machine": where,
        "commit": commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "flags": list(run.flags),
    }
