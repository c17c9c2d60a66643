"""A sweep's folder: what each run was begun with, its log, its row; and who is at it.

    sweep.json               marks the folder as a sweep's
    results.jsonl            the rows of all finished runs, collected
    grids/HASH.yaml          grids as they were submitted to Slurm
    runs/NAME/run.json       the flags that the run was begun with
    runs/NAME/row.json       what it measured, once it has finished
    runs/NAME/train.log      what training printed, over all its launches
    runs/NAME/checkpoints    with --save-interval, and on Slurm

Every file but the log is there whole or not at all, so that tasks on many machines may write at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.files import read_json, write_json, write_whole
from .errors import RunBusy, SweepError
from .grid import Run
from .setting import Setting

_MARK = "sweep.json"
_MARKED = {"sla-sweep": 1}

#: How long to wait for an earlier process of a run, which may be on its way out.
_PATIENCE = 60.0


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def row(self) -> Path:
        return self.path / "row.json"

    @property
    def begun(self) -> Path:
        return self.path / "run.json"

    @property
    def data_cache(self) -> Path:
        """Megatron's index of shuffled samples, one a run: runs that begin at once would read it half-written."""
        return self.path / "data-cache"

    @contextmanager
    def locked(self, say: Callable[[str], None], patience: float = _PATIENCE) -> Iterator[int]:
        """Within the block this process alone is at the run; yields a descriptor for training to hold on to as well.

        Raises:
            RunBusy: if another process still is after ``patience`` seconds.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            deadline, said = time.monotonic() + patience, False
            while not _try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise RunBusy(f"{self.path.name} is being trained by another process")
                if not said:
                    say(f"{self.path.name}: waiting for another process of this run to end")
                    said = True
                time.sleep(0.2)
            yield descriptor
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks: Slurm starts each task of an array once, and this is what there is.
        return True
    return True


@dataclass(frozen=True)
class SweepFolder:
    """The folder that ``--out`` names."""

    path: Path

    def require(self) -> None:
        """Raise :class:`SweepError` where this is no sweep's folder."""
        if not self._is_marked():
            raise SweepError(f"--out {self.path}: expected a sweep's folder, as sla-sweep run or submit makes it")

    def accept(self, runs: Sequence[Run]) -> None:
        """Raise :class:`SweepError` where ``runs`` cannot go into the folder; writes nothing.

        A folder is a sweep's own, new or empty.  All of its runs of one size, context and seed have the same flags, but
        for their setting's: those that were begun, and these.
        """
        if self.path.exists() and not self._is_marked():
            if not self.path.is_dir() or any(self.path.iterdir()):
                raise SweepError(f"--out {self.path}: expected a new folder, or a sweep's")
        begun = [_read(path) for path in sorted(self.path.glob("runs/*/run.json"))]
        flags = {(one["size"], one["context"], one["seed"]): one for one in begun if one is not None}
        for run in runs:
            before = flags.get((run.size, run.shape.context, run.seed))
            if before is not None and before["flags"] != list(run.dense_flags):
                raise SweepError(
                    f"{run.name}: {before['name']}, to which it compares, was begun with other flags "
                    f"({difference(before['flags'], run.dense_flags)}): expected the same grid, or another --out"
                )

    def _is_marked(self) -> bool:
        try:
            return read_json(self.path / _MARK) == _MARKED
        except (OSError, ValueError):
            return False

    def create(self) -> None:
        """Make and mark the folder."""
        try:
            (self.path / "runs").mkdir(parents=True, exist_ok=True)
            if not (self.path / _MARK).exists():
                write_json(self.path / _MARK, _MARKED)
        except OSError as error:
            raise SweepError(f"--out {self.path}: {error.strerror}: expected a folder that can be written") from error

    def run(self, run: Run) -> RunFolder:
        """Where ``run`` is."""
        return RunFolder(self.path / "runs" / run.name)

    def begin(self, run: Run) -> None:
        """Remember what ``run`` is begun with."""
        folder = self.run(run)
        if not folder.begun.exists():
            point = {"name": run.name, "size": run.size, "context": run.shape.context, "seed": run.seed}
            write_json(folder.begun, point | {"flags": list(run.dense_flags), "sla": list(run.setting.flags)})

    def finished(self, run: Run) -> bool:
        """Whether ``run`` has its row."""
        return self.run(run).row.is_file()

    def unfinished(self) -> list[str]:
        """Names of runs that were begun and have no row."""
        begun = [RunFolder(path.parent) for path in self.path.glob("runs/*/run.json")]
        return sorted(folder.path.name for folder in begun if not folder.row.is_file())

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all finished runs: by size, context, setting, seed."""
        found = [_read(path) for path in self.path.glob("runs/*/row.json")]
        return sorted((row for row in found if row is not None), key=_order)

    def collect(self) -> list[dict[str, Any]]:
        """Write ``results.jsonl`` anew, and return its rows."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Of two that write at once the later one has read all rows of the earlier.
            while not _try_lock(descriptor):
                time.sleep(0.05)
            rows = self.rows()
            write_whole(self.path / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows), durable=True)
        finally:
            os.close(descriptor)
        return rows


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["size"], row["context"], *Setting.of_row(row).order, row["seed"])


def _read(path: Path) -> dict[str, Any] | None:
    """What the sweep wrote to ``path``; None without the file."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise SweepError(f"{path} cannot be read ({error}): expected it as it was written, or moved away") from error


def difference(before: Sequence[str], now: Sequence[str]) -> str:
    """The first flag that is not the same, as it was and as it is."""
    old, new = _by_flag(before), _by_flag(now)
    for flag in dict.fromkeys([*old, *new]):
        if old.get(flag) != new.get(flag):
            return f"{old.get(flag, f'no {flag}')}, now {new.get(flag, f'no {flag}')}"
    return "the same in another order"


def _by_flag(flags: Sequence[str]) -> dict[str, str]:
    """``--lr`` -> ``--lr 1e-3``; of a flag that comes twice the last."""
    found: dict[str, str] = {}
    name = ""
    for word in flags:
        if word.startswith("--"):
            name = word.partition("=")[0]
            found[name] = word
        else:
            found[name] = f"{found.get(name, name)} {word}"
    return found
