"""Why an attempt ended: the error of the rank that failed first.

A rank that raises says so in its own log; of one that was killed only its launcher knows, which speaks in the job's log:
torchrun's ``ChildFailedError`` (torch/distributed/elastic/multiprocessing/errors), or srun.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ....common.errors import TRAINING
from ..chain import Attempt
from .rank_logs import AttemptLogs, LogFile
from .steps import tail

#: What is read of the end of a rank's log, of how many, and of the end of the job's.
_RANK_BYTES, _RANKS, _JOB_BYTES = 1 << 15, 1024, 1 << 18

#: What a rank says when it is another that has failed, and this one waits for it (gloo, NCCL, the store of ranks).
_OTHERS_FAULT = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|remote process exited|Connection refused"
    r"|failed to connect|Socket Timeout|Watchdog caught collective operation timeout|DistBackendError|SignalException"
)

_RANK = re.compile(r"^\[rank(\d+)\]: ?")
#: torchrun's account of a failure.
_ROOT_CAUSE = re.compile(
    r"Root Cause \(first observed failure\):\s+\[\d+\]:\s+time +: (?P<time>\S+)\s+host +: (?P<host>\S+)\s+"
    r"rank +: (?P<rank>\d+) \(local_rank: (?P<local>\d+)\)\s+exitcode +: (?P<code>-?\d+) \(pid: \d+\)[^\n]*\s+"
    r"error_file: [^\n]*\s+traceback : (?P<traceback>[^\n]*)"
)
_SRUN = re.compile(
    r"srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,-]+): (?P<how>Killed|Out Of Memory|Segmentation fault|Aborted|Bus error)"
)
_LABEL = re.compile(r"^ *\d+: ", re.MULTILINE)


@dataclass(frozen=True)
class Reason:
    """What was said, and which rank said it; None where it is not of one rank."""

    text: str
    rank: str | None = None


def reason(attempt: Attempt, logs: AttemptLogs, after: Attempt | None) -> Reason | None:
    """Why ``attempt``, which has ended, did so; None where nothing was said.

    Args:
        attempt: of the chain.
        logs: of its ranks.
        after: the attempt after it, before which it has ended in the job's log.
    """
    if attempt.how == "finished":
        return None
    if attempt.failed or attempt.how.startswith("status") or attempt.how == "without a word":
        job_log = _LABEL.sub("", _job_log(attempt, after))
        return _of_launcher(job_log, logs) or _of_ranks(logs)
    found = (re.search(r"^\[(exiting program .*?)\.?\] datetime: ", tail(file.path, _RANK_BYTES), re.MULTILINE)
             for file in logs.files if file.path.name == "stdout.log")  # fmt: skip
    said = next((match[1] for match in found if match), None)
    return Reason(f"Megatron: {said}") if said else None


def _job_log(attempt: Attempt, after: Attempt | None) -> str:
    """What the job's log has of the end of ``attempt``."""
    if attempt.log is None:
        return ""
    end = after.log_from if after is not None and after.log == attempt.log else None
    return tail(Path(attempt.log), _JOB_BYTES, attempt.log_from or 0, end)


def _of_launcher(job_log: str, logs: AttemptLogs) -> Reason | None:
    """The first failure that torchrun or srun saw, in the rank's own words where it had time for some."""
    failures = sorted(_ROOT_CAUSE.finditer(job_log), key=lambda found: found["time"])
    if failures:
        first = failures[0]
        name = f"rank {first['rank']} (local rank {first['local']})"
        if int(first["code"]) < 0:
            memory = ", out of memory" if re.search("oom-kill|Out Of Memory", job_log) else ""
            return Reason(first["traceback"].partition(" received by")[0] + memory, name)
        of_rank = [error for error in _errors(logs) if error.is_of(first["rank"], first["local"])]
        if of_rank:
            return Reason(min(of_rank, key=_Error.order).text, name)
        return Reason(f"exit status {first['code']}", name)
    if killed := _SRUN.search(job_log):
        return Reason(killed["how"], f"task {killed['tasks']} on {killed['node']}")
    return None


@dataclass(frozen=True)
class _Error:
    text: str
    file: LogFile
    rank: str | None

    def order(self) -> tuple[bool, float]:
        """Errors that others led to come after those; the earlier before the later."""
        return bool(_OTHERS_FAULT.search(self.text)), self.file.changed

    def is_of(self, rank: str, local: str) -> bool:
        return self.rank == rank if self.rank is not None else self.file.local_rank == local


def _of_ranks(logs: AttemptLogs) -> Reason | None:
    """The first error that any rank logged; or that a rank said nothing, where the others only miss one."""
    errors = list(_errors(logs))
    if not errors:
        return None
    first = min(errors, key=_Error.order)
    silent = {file.rank for file in logs.files} - {error.file.rank for error in errors}
    if _OTHERS_FAULT.search(first.text) and silent:
        who = min(silent) if len(silent) == 1 else f"{len(silent)} ranks, {min(silent)} among them"
        return Reason("ended without a word: killed, or its node failed; others say: " + first.text, who)
    return Reason(first.text, f"rank {first.rank}" if first.rank else first.file.rank)


def _errors(logs: AttemptLogs) -> Iterator[_Error]:
    ranks = set()
    # What ends a rank is on stderr, "stderr.log" before "stdout.log".
    for file in sorted(logs.files, key=lambda file: file.name)[: 2 * _RANKS]:
        if file.rank not in ranks and file.bytes and (found := error_line(tail(file.path, _RANK_BYTES))):
            ranks.add(file.rank)
            yield _Error(found[0], file, found[1])


def error_line(text: str) -> tuple[str, str | None] | None:
    """What ended the process whose log ends with ``text``, in one line, and the global rank that says so."""
    lines = text.splitlines()
    for place in range(len(lines) - 1, -1, -1):
        rank = _RANK.match(lines[place])
        line = _RANK.sub("", lines[place])
        if line.startswith("Traceback (most recent call last)"):
            # What is raised while an object is removed ends nothing.
            if not (place and _RANK.sub("", lines[place - 1]).startswith("Exception ignored")):
                raised = _raised(lines[place + 1 :])
                if raised is not None:
                    return raised, rank[1] if rank else None
        elif re.match(rf"(\S+\.)?\S+: error: |  what\(\):|Fatal Python error: |{TRAINING}: error: ", line):
            return line.strip(), rank[1] if rank else None
    return None


def _raised(lines: list[str]) -> str | None:
    """The line of the exception, after the frames of its traceback."""
    for line in lines:
        line = _RANK.sub("", line)
        if line and not line.startswith((" ", "\t")):
            return line
    return None
