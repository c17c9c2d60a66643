"""Runs one training under torchrun: full log to a file, one short line per report to the terminal."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from pathlib import Path

from examples.quickstart import training_log
from examples.quickstart.progress import Progress
from examples.quickstart.training_log import LAUNCH_MARK, Records, describe, stage
from sla_megatron.common.launchers import stop, torchrun

TAIL_LINES = 30
# torchrun follows a failure with a traceback of its own, which says nothing about the cause.
TORCHRUN_REPORT = re.compile(r"elastic/multiprocessing/api\.py.*failed \(exitcode")


class TrainingFailed(RuntimeError):
    """Training ended with an error; the message holds the end of its log."""


def command(ranks: int, flags: list[str]) -> list[str]:
    """The torchrun command line that trains on `ranks` processes of this machine."""
    return [*torchrun(ranks), "-m", "sla_megatron.pretrain_gpt", *flags]


def environment(ranks: int) -> dict[str, str]:
    """This process's environment, with defaults that training wants; what the user has set stays."""
    env = dict(os.environ)
    # Half of the cores: ranks compete for memory, and laptops count each core twice.
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (2 * ranks))))
    # Megatron asks for it with tensor parallelism on older GPUs, so that communication starts in order.
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return env


def train(name: str, ranks: int, flags: list[str], log: Path) -> Records:
    """Trains with `flags`, appends everything printed to `log`, and returns what all its lines say.

    Raises TrainingFailed when it exits with anything but 0. Being interrupted (Ctrl-C, SIGTERM) ends the
    training processes too; the last checkpoint remains.
    """
    argv = command(ranks, flags)
    # With earlier, interrupted launches of the same run.
    records, started = training_log.read(log), time.monotonic()
    print(f"\n{name}: starting {ranks} {'ranks' if ranks > 1 else 'rank'}; log in {log}", flush=True)
    with log.open("a") as file, Progress(name, "importing torch and Megatron") as progress:
        file.write(f"{LAUNCH_MARK}{shlex.join(argv)}\n")
        file.flush()
        records.read(LAUNCH_MARK)
        # Not PYTHONUNBUFFERED: ranks share the pipe, and only buffered writes keep their lines whole.
        process = subprocess.Popen(
            argv,
            env=environment(ranks),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                progress.doing = stage(line) or progress.doing
                if event := records.read(line):
                    progress.say(f"{name:>6} {describe(event)}")
            code = process.wait()
        except BaseException:
            stop(process)
            raise
    if code:
        end = failure_tail(log.read_text(errors="replace"))
        raise TrainingFailed(f"{end}\nquickstart: {name} training failed (exit code {code}); log: {log}")
    print(f"{name}: done in {time.monotonic() - started:.0f} s", flush=True)
    return records


def failure_tail(text: str) -> str:
    """The last lines of the last launch in the log `text`, without torchrun's own report of the failure."""
    lines = text.splitlines()
    start = max((i for i, line in enumerate(lines) if line.startswith(LAUNCH_MARK)), default=0)
    end = next((i for i in range(start, len(lines)) if TORCHRUN_REPORT.search(lines[i])), len(lines))
    return "\n".join(lines[start:end][-TAIL_LINES:])
