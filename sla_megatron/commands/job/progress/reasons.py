"""Why an attempt ended: the error of the rank that failed first.

A rank that raises says so in its own log.  Of one that was killed only its launcher knows, which speaks in the job's
log: torchrun's ``ChildFailedError`` (torch/distributed/elastic/multiprocessing/errors), or srun.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..chain import Attempt
from .rank_logs import AttemptLogs, LogFile
from .steps import tail

#: What is read of the end of a rank's log, of how many, and of the end of the job's.
_RANK_BYTES, _RANKS, _JOB_BYTES = 1 << 15, 1024, 1 << 18

#: What a rank says when it is another that has failed, and this one waits for it (gloo, NCCL, the store of ranks).
_OTHERS_FAULT = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|remote process exited|Connection refused"
    r"|failed to connect|Socket Timeout|Watchdog caught collective operation timeout|DistBackendError|SignalException"
    r"|pair closure|recvValue failed|sendBytes failed|Connection was likely closed"
)

_RANK = re.compile(r"^\[rank(\d+)\]: ?")
_EXITING = re.compile(r"^\[(exiting program .*?)\.?\] datetime: ", re.MULTILINE)
#: Ends of an attempt that are no failure.
_BY_ITSELF = ("preempted", "exited", "stopped")
#: torchrun's account of a failure.
_ROOT_CAUSE = re.compile(
    r"Root Cause \(first observed failure\):\s+\[\d+\]:\s+time +: (?P<time>\S+)\s+host +: (?P<host>\S+)\s+"
    r"rank +: (?P<rank>\d+) \(local_rank: (?P<local>\d+)\)\s+exitcode +: (?P<code>-?\d+) \(pid: \d+\)[^\n]*\s+"
    r"error_file: [^\n]*\s+traceback : (?P<traceback>[^\n]*)"
)
_SRUN = re.compile(
    r"srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,-]+): "
    r"(?P<how>Killed|Out Of Memory|Segmentation fault|Aborted|Bus error)"
)
#: What ends a process without a traceback.
_SAID = re.compile(r"\S+: error: |  what\(\):|Fatal Python error: ")
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
    if attempt.how not in _BY_ITSELF:
        job_log = _LABEL.sub("", _job_log(attempt, after))
        if (found := _of_launcher(job_log, logs) or _of_ranks(logs)) is not None:
            return found
    return _of_megatron(logs)


def _of_megatron(logs: AttemptLogs) -> Reason | None:
    """Why Megatron ended by itself (``checkpoint_and_decide_exit`` in megatron/training/training.py)."""
    for file in logs.files:
        if found := _EXITING.search(tail(file.path, _RANK_BYTES)):
            return Reason(f"Megatron: {found[1]}")
    return None


def _job_log(attempt: Attempt, after: Attempt | None) -> str:
    """What the job's log has of the end of ``attempt``."""
    if attempt.log is None:
        return ""
    end = after.log_from if after is not None and after.log == attempt.log else None
    return tail(Path(attempt.log), _JOB_BYTES, attempt.log_from or 0, end)


def _of_launcher(job_log: str, logs: AttemptLogs) -> Reason | None:
    """The first failure that torchrun or srun saw, in the rank's own words where it had time for some.

    Each node's torchrun tells of its own first one: one that another led to does not count.
    """
    failures = sorted(_ROOT_CAUSE.finditer(job_log), key=lambda found: (found["time"], int(found["code"]) >= 0))
    errors = list(_errors(logs)) if failures else []
    for found in failures:
        name, code = f"rank {found['rank']} (local rank {found['local']})", int(found["code"])
        if code < 0 and code != -signal.SIGTERM:
            memory = ", out of memory" if re.search("oom-kill|Out Of Memory", job_log) else ""
            return Reason(found["traceback"].partition(" received by")[0] + memory, name)
        own = min(
            (error for error in errors if error.is_of(found["rank"], found["local"])), key=_Error.order, default=None
        )
        if own is not None and not own.is_anothers_fault:
            return Reason(own.text, name)
    if failures:
        # What is wrong for all is said by one of them.
        return _of_ranks(logs) or Reason(f"exit status {code}", name)
    if killed := _SRUN.search(job_log):
        return Reason(killed["how"], f"task {killed['tasks']} on {killed['node']}")
    return None


@dataclass(frozen=True)
class _Error:
    text: str
    file: LogFile
    rank: str | None

    @property
    def is_anothers_fault(self) -> bool:
        return bool(_OTHERS_FAULT.search(self.text))

    def order(self) -> tuple[bool, float]:
        """Errors that others led to come after those; the earlier before the later."""
        return self.is_anothers_fault, self.file.changed

    def is_of(self, rank: str, local: str) -> bool:
        return self.rank == rank if self.rank is not None else self.file.local_rank == local


def _of_ranks(logs: AttemptLogs) -> Reason | None:
    """The first error that any rank logged; or that a rank said nothing, where the others only miss one."""
    errors = list(_errors(logs))
    if not errors:
        return None
    first = min(errors, key=_Error.order)
    silent = {file.rank for file in logs.files} - {error.file.rank for error in errors}
    if first.is_anothers_fault and silent:
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
    """What ended the process whose log ends with ``text``, in one line, and the global rank that says so.

    With ranks' numbers before them are those that end a rank (the hook of ``init_process_group``).  Of others it is the
    first: a helper of the rank fails before the rank that waits for it.
    """
    found = _raised(text.splitlines())
    errors = [each for each in found if each[1]] or found
    return errors[0] if errors else None


def _raised(lines: list[str]) -> list[tuple[str, str | None]]:
    """The line of each error; of exceptions of which one led to another the last alone."""
    found, traceback, ignored, follows = [], False, False, False
    for line in lines:
        rank = _RANK.match(line)
        line = _RANK.sub("", line)
        if line.startswith("Traceback (most recent call last)"):
            traceback = True
        elif re.match("Exception (ignored|in thread) ", line):
            ignored = True
        elif re.match("During handling of the above|The above exception was", line):
            follows = True
        elif (traceback and line and not line.startswith((" ", "\t"))) or _SAID.match(line):
            if not ignored:
                if follows and found:
                    found.pop()
                found.append((line.strip(), rank[1] if rank else None))
            traceback = ignored = follows = False
        elif found and found[-1][0].endswith(":") and line.strip():
            # A message that begins with the line after.
            found[-1] = (f"{found[-1][0]} {line.strip()}", found[-1][1])
    return found
