"""A run as a chain of attempts: where each began and ended, and what comes next.

``chain.json`` in the run's folder remembers the attempts, so that a first start and a lost checkpoint, a preemption and
a crash loop are told apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ...common.checkpoint_folders import TRACKER, checkpoints, newest_complete, point_to, stored_args, tracked
from ...common.files import write_json
from .checked import Checked, known_damage, set_aside_damaged
from .flags import JobError, TrainingFlags
from .stop_file import refuse_if_stopped, stop_file

FINISHED, REQUEUE, STOP, STOPPED = "finished", "requeue", "stop", "stopped"


@dataclass
class Attempt:
    """One start of the job.  Iterations are of the newest complete checkpoint, 0 before the first."""

    job: str
    nodes: str
    began: str
    began_at: int
    ended: str | None = None
    ended_at: int | None = None
    how: str | None = None
    #: Slurm's count of the job's starts before this one, which names the folder of its logs.
    restart: int | None = None
    #: The job's log, and its length when the attempt began.
    log: str | None = None
    log_from: int | None = None
    #: Failures in a row that end the chain.
    max_failures: int | None = None

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Attempt:
        """Raises TypeError or ValueError for what is none."""
        attempt = cls(**stored)
        if not isinstance(attempt.began_at, int) or not isinstance(attempt.ended_at, int | None):
            raise ValueError(f"iterations {attempt.began_at} to {attempt.ended_at}")
        return attempt

    def stored(self) -> dict[str, Any]:
        """For :meth:`read`; of an attempt of before what was not noted then is not there."""
        later = ("restart", "log", "log_from", "max_failures")
        return {name: value for name, value in asdict(self).items() if value is not None or name not in later}

    @property
    def clock(self) -> float:
        """When it began, in seconds."""
        return datetime.fromisoformat(self.began).timestamp()

    @property
    def failed(self) -> bool:
        """Whether it ended by itself, or without a word, and left no newer checkpoint than it began with."""
        return self.how not in ("preempted", "finished", STOPPED) and (self.ended_at or self.began_at) <= self.began_at


@dataclass
class Chain:
    """The attempts of the run in ``folder``."""

    folder: Path
    attempts: list[Attempt] = field(default_factory=list)
    #: ``restart``, ``log`` and ``log_from`` of an attempt that begins now, as far as they are known.
    logs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Chain:
        """Raises JobError if there is a file that cannot be read."""
        path = folder / "chain.json"
        try:
            attempts = json.loads(path.read_text())["attempts"]
            if not isinstance(attempts, list):
                raise ValueError(f"attempts: {type(attempts).__name__}")
            return cls(folder, [Attempt.read(attempt) for attempt in attempts])
        except FileNotFoundError:
            return cls(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JobError(f"{path} cannot be read ({error}): expected it as it was, or moved away") from error

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "chain.json", {"attempts": [attempt.stored() for attempt in self.attempts]})

    @property
    def newest(self) -> int:
        """The newest checkpoint that was ever seen complete."""
        return max((max(a.began_at, a.ended_at or 0) for a in self.attempts), default=0)

    def known_damage(self, save: Path) -> Callable[[Path], str | None]:
        """What is known against complete checkpoints in ``save``."""
        last = self.attempts[-1] if self.attempts else None
        return known_damage(Checked(self.folder), save, last.began_at if last else 0, last.began if last else "")

    def failures(self, job: str) -> int:
        """How many of the last attempts of ``job`` failed in a row; a job that is submitted anew counts from 0."""
        count = 0
        for attempt in reversed(self.attempts):
            if attempt.job != job or not attempt.failed:
                break
            count += 1
        return count


def begin(chain: Chain, flags: TrainingFlags, job: str, nodes: str, limit: int, say: Callable[[str], None]) -> str:
    """Before an attempt: the checkpoint folder is put in order, the attempt is noted.

    Args:
        chain: the attempts so far.
        flags: of the run.
        job: Slurm's number of the job.
        nodes: where it runs.
        limit: failures in a row that end the chain.
        say: receives lines for the log.

    Returns:
        ``FINISHED`` if there is nothing left to train, ``STOP`` in a crash loop, else ``REQUEUE``: go on.

    Raises:
        JobError: if checkpoints that there were are gone, or somebody has stopped the run.
    """
    refuse_if_stopped(chain.folder)
    damage = chain.known_damage(flags.save)
    newest, broken = newest_complete(flags.save, damage)
    if chain.attempts and chain.attempts[-1].ended is None:
        _note_end(chain.attempts[-1], newest, "without a word")
        say(f"attempt {len(chain.attempts)} ended without a word: its node failed, or the job was killed")
    said = tracked(flags.save)
    known = max(chain.newest, said if isinstance(said, int) else 0)
    if newest is None and known:
        seen = "; ".join(f"{path.name}: {reason}" for path, reason in broken.items()) or "no iter_* folder"
        raise JobError(
            f"{flags.save} had a checkpoint of iteration {known} and has no complete one now ({seen}): expected it to "
            f"be restored; to begin anew, another --save, or remove {chain.folder / 'chain.json'} and {TRACKER}"
        )
    if newest is None:
        if flags.must_find_checkpoint:
            raise JobError(
                f"--exit-on-missing-checkpoint: {flags.save} has no checkpoint, and the first attempt would save none: "
                "expected one, or no such flag"
            )
        if said is not None:
            raise JobError(f"{flags.save / TRACKER} says {said!r}: expected an iteration, or no file")
        say("no checkpoint yet: starting from the beginning" if chain.attempts else "first start: no checkpoint yet")
        for path, reason in broken.items():
            say(f"{path} is not complete ({reason}), and the first: it will be written anew")
    else:
        if newest < known:
            say(f"the checkpoint of iteration {known} is lost or damaged: falling back to iteration {newest}")
        point_to(flags.save, newest, broken, say)
        set_aside_damaged(flags.save, damage, say)
        say(f"resuming from iteration {newest}")
    stored = _stored(flags, newest)
    if flags.finished(newest, stored):
        say(f"finished: iteration {newest} of {flags.last_iteration(stored)}")
        chain.write()
        return FINISHED
    if chain.failures(job) >= limit:
        chain.write()
        return _stopped(chain, job, say)
    chain.attempts.append(Attempt(job, nodes, _now(), newest or 0, max_failures=limit, **chain.logs))
    chain.write()
    say(f"attempt {len(chain.attempts)} of this run, job {job} on {nodes}")
    return REQUEUE


def end(
    chain: Chain, flags: TrainingFlags, status: int, signalled: bool, limit: int, say: Callable[[str], None]
) -> str:
    """After an attempt that ended with ``status``: ``FINISHED``, ``REQUEUE``, ``STOP``, or ``STOPPED`` by a stop file.

    Whether an attempt got anywhere is read off its checkpoints: torchrun returns 1 after a signal even if all ranks
    saved, and Megatron 0 after errors.
    """
    if not chain.attempts:
        raise JobError(f"{chain.folder}: expected an attempt that has begun")
    attempt = chain.attempts[-1]
    newest, _ = newest_complete(flags.save, chain.known_damage(flags.save))
    saved = f"iteration {newest} is saved" if newest else "nothing is saved"
    gained = (newest or 0) - attempt.began_at
    gain = f"{gained} iterations more than it began with" if gained > 0 else "no more than it began with"
    done = newest is not None and flags.finished(newest, _stored(flags, newest))
    # What trains nothing, or does not say for how long, is at its end when it ends well.
    endless = flags.skip_train or (flags.train_iters is None and flags.train_samples is None)
    stopper = stop_file(chain.folder)
    if done or (endless and status == 0 and not signalled):
        how, verdict, line = "finished", FINISHED, f"finished: {saved}"
    elif stopper and (signalled or (status == 0 and gained > 0)):
        how, verdict, line = STOPPED, STOPPED, f"stopped: {saved}, {gain}"
    elif signalled:
        how, verdict, line = "preempted", REQUEUE, f"ended by a signal: {saved}, {gain}"
    elif status == 0 and gained > 0:
        how, verdict, line = "exited", REQUEUE, f"ended by itself before the last iteration: {saved}"
    else:
        how, verdict, line = f"status {status}", REQUEUE, f"failed with status {status}: {saved}, {gain}"
    _note_end(attempt, newest, how)
    chain.write()
    say(f"attempt {len(chain.attempts)} {line}")
    if stopper and verdict != FINISHED:
        say(f"not going on: {stopper} is there; removed, the job goes on when it is submitted again")
        return STOPPED
    if verdict == REQUEUE and chain.failures(attempt.job) >= limit:
        return _stopped(chain, attempt.job, say)
    return verdict


def _stored(flags: TrainingFlags, newest: int | None) -> dict[str, Any]:
    return {} if newest is None else stored_args(checkpoints(flags.save)[newest])


def _stopped(chain: Chain, job: str, say: Callable[[str], None]) -> str:
    say(
        f"stopping: {chain.failures(job)} attempts in a row failed without a new checkpoint; the logs say why. "
        "Submitted again, the job goes on from the newest checkpoint"
    )
    return STOP


def _note_end(attempt: Attempt, newest: int | None, how: str) -> None:
    attempt.ended, attempt.ended_at, attempt.how = _now(), newest or 0, how


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
