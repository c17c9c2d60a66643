"""What Slurm's ``squeue`` says of a job, where there is one."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

_SECONDS = 10.0


@dataclass(frozen=True)
class QueuedJob:
    """A job as Slurm knows it; ``state`` is GONE for one that has ended."""

    state: str
    reason: str | None = None
    seconds_left: float | None = None

    @property
    def gone(self) -> bool:
        return self.state == "GONE"

    @property
    def waits(self) -> bool:
        return self.state not in ("GONE", "RUNNING", "COMPLETING", "CONFIGURING", "STOPPED", "SIGNALING", "STAGE_OUT")


def queued(job: str) -> QueuedJob | None:
    """None where nothing is known of it: no Slurm here, no such number, or a controller that does not answer."""
    if not re.fullmatch(r"\d+(_\d+)?", job):
        return None
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T|%L|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return QueuedJob("GONE") if "Invalid job id" in done.stderr else None
    # The array's own number, of its last task, lists those that are waiting as well.
    lines = [line for line in done.stdout.splitlines() if line.count("|") == 2]
    if not lines:
        return QueuedJob("GONE")
    state, left, reason = lines[0].strip().split("|")
    return QueuedJob(state, None if reason in ("None", "") else reason, seconds(left))


def seconds(text: str) -> float | None:
    """``1-02:03:04``, ``02:03:04`` or ``03:04`` as Slurm writes a time; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
