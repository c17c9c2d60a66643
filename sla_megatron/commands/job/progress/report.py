"""How a run is doing, as one object whose keys stay: docs/slurm.md describes them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from ....common.checkpoint_folders import checkpoints, newest_complete, stored_args
from ....common.files import read_json
from ..chain import Attempt, Chain
from .events import logged_steps, newest_events
from .queue import QueuedJob, queued
from .rank_logs import AttemptLogs, logs_of
from .reasons import reason
from .steps import Step

#: States after which nothing more comes by itself.
ENDED = ("finished", "stopped", "failed")


def report(run: Path, ask: Callable[[str], QueuedJob | None] = queued) -> dict[str, Any]:
    """The run in ``run``, now.

    Args:
        run: its folder, with a chain.json.
        ask: what Slurm knows of a job.
    """
    chain, now = Chain.read(run), time.time()
    logs = logs_of(chain)
    attempts = [_attempt(chain.attempts, number, logs[number], now) for number in range(len(chain.attempts))]
    arguments = next((found for each in reversed(logs) if (found := each.arguments)), {})
    save = _folder(arguments, "save", run / "checkpoints")
    newest, broken = newest_complete(save)
    stored = stored_args(checkpoints(save)[newest]) if newest is not None else {}
    first, last, source = _steps(run, chain, logs, arguments)
    length = _integer(arguments.get("seq_length")) or stored.get("seq_length")
    total = (last.last if last else None) or _integer(arguments.get("train_iters")) or stored.get("train_iters")
    job = ask(chain.attempts[-1].job) if chain.attempts else None
    iteration = last.iteration if last else max(newest or 0, chain.attempts[-1].began_at if chain.attempts else 0)
    saving = max((int(path.name[5:]) for path in broken), default=None)
    state = _state(chain, newest, total, last is not None, job, run)
    pace = _pace(first, last)
    left = max(0, total - iteration) if total is not None else None
    return {
        "run": str(run),
        "state": state,
        "slurm": {"job": chain.attempts[-1].job, "state": job.state, "reason": job.reason} if job else None,
        "iteration": iteration,
        "train_iters": total,
        "seconds_since_iteration": _since(last, logs, source, now),
        "loss": last.loss if last else None,
        "tokens_per_second": {
            "now": _rate(last.batch, length, last.seconds) if last else None,
            "attempt": _rate(_samples(first, last), length, _seconds(first, last)),
        },
        "seconds_left": {
            "training": None if left is None or pace is None else left * pace,
            "job": job.seconds_left if job else None,
        },
        "saving": saving if state in ("training", "starting") else None,
        "checkpoint": None if newest is None else _checkpoint(run, checkpoints(save)[newest], newest, now),
        "read": source,
        "attempts": attempts,
    }


def _steps(
    run: Path, chain: Chain, logs: list[AttemptLogs], arguments: dict[str, str]
) -> tuple[Step | None, Step | None, str | None]:
    """The first and last iteration of the newest attempt, and where they were found."""
    if not chain.attempts:
        return None, None, None
    if logs[-1].last is not None:
        return logs[-1].first, logs[-1].last, "logs"
    events = newest_events(_folder(arguments, "tensorboard_dir", run / "tensorboard"))
    # Those of an attempt before this one say nothing of it.
    if events is not None and events.stat().st_mtime >= chain.attempts[-1].clock:
        found = logged_steps(events)
        if found is not None:
            return *found, "tensorboard"
    return None, None, None


def _folder(arguments: dict[str, str], name: str, usual: Path) -> Path:
    """The one of Megatron's argument, if it is there: what is asked of a container, or elsewhere, may not be."""
    given = Path(arguments.get(name, usual))
    return given if given.is_dir() else usual


def _state(chain: Chain, newest: int | None, total: int | None, trained: bool, job: QueuedJob | None, run: Path) -> str:
    attempt = chain.attempts[-1] if chain.attempts else None
    if (attempt and attempt.how == "finished") or (total is not None and (newest or 0) >= total):
        return "finished"
    if attempt is None or (job and job.waits):
        return "waiting"
    if attempt.ended is None and not (job and job.gone):
        return "training" if trained else "starting"
    if attempt.how == "stopped" or (run / "stop").exists():
        return "stopped"
    if job and job.gone:
        # Ended in the middle, it failed; else somebody cancelled what would have gone on.
        return "failed" if attempt.ended is None or attempt.failed else "stopped"
    # Slurm is asked whether the job goes on; where it is not known, the chain's own rule.
    if job is None and attempt.max_failures and chain.failures(attempt.job) >= attempt.max_failures:
        return "failed"
    return "between attempts"


def _attempt(attempts: list[Attempt], number: int, logs: AttemptLogs, now: float) -> dict[str, Any]:
    attempt = attempts[number]
    first, last = logs.first, logs.last
    why = None
    if attempt.ended is not None:
        why = reason(attempt, logs, attempts[number + 1] if number + 1 < len(attempts) else None)
        until = _clock(attempt.ended)
        if attempt.how == "without a word" and logs.files:
            # It was noted when the next one began.
            until = min(until, max(file.changed for file in logs.files))
    saved = attempt.began_at if attempt.ended_at is None else attempt.ended_at
    return {
        "number": number + 1,
        "job": attempt.job,
        "nodes": attempt.nodes,
        "began": attempt.began,
        "began_at": attempt.began_at,
        "ended": attempt.ended,
        "ended_at": attempt.ended_at,
        "how": attempt.how,
        "seconds": max(0.0, (now if attempt.ended is None else until) - attempt.clock),
        "first_iteration": first.iteration if first else None,
        "last_iteration": last.iteration if last else None,
        "lost_iterations": max(0, last.iteration - saved) if last and attempt.ended is not None else None,
        "reason": why.text if why else None,
        "rank": why.rank if why else None,
    }


def _checkpoint(run: Path, folder: Path, iteration: int, now: float) -> dict[str, Any]:
    known = None
    # What sla-job attend notes; it need not run.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        look = read_json(run / "checked.json")["checkpoints"][folder.name]
        known = {"when": look["when"], "damage": look["damage"]}
    age = now - (folder / ".metadata").stat().st_mtime
    return {"iteration": iteration, "folder": str(folder), "seconds_old": max(0.0, age), "checked": known}


def _since(last: Step | None, logs: list[AttemptLogs], source: str | None, now: float) -> float | None:
    """By the clock of this machine's files, since a node's own may be of another zone."""
    if last is None:
        return None
    logged = logs[-1].training.changed if source == "logs" else last.time
    return None if logged is None else max(0.0, now - logged)


def _pace(first: Step | None, last: Step | None) -> float | None:
    """Seconds of an iteration, saves and evaluations between them included where there is more than one."""
    seconds = _seconds(first, last)
    if seconds:
        return seconds / (last.iteration - first.iteration)
    return last.seconds if last else None


def _seconds(first: Step | None, last: Step | None) -> float | None:
    if first is None or last is None or last.iteration <= first.iteration or None in (first.time, last.time):
        return None
    return last.time - first.time


def _samples(first: Step | None, last: Step | None) -> float | None:
    if first is None or last is None:
        return None
    if None not in (first.samples, last.samples):
        return last.samples - first.samples
    return None if last.batch is None else last.batch * (last.iteration - first.iteration)


def _rate(samples: float | None, length: int | None, seconds: float | None) -> float | None:
    return None if not samples or not length or not seconds else samples * length / seconds


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _clock(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
