"""The report's folder, which a later call goes on in, and the archive beside it.

OUT/report.json     every row: how it went, its command, how long it took; versions
OUT/report.txt      the same as a table
OUT/ROW/log.txt     what a row printed; beside it the JSON and the pictures that it wrote
OUT/tmp             temporary files and caches of the rows, gone at the end
OUT.tar.gz          all but the last
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sla_megatron.common.errors import FlagError
from sla_megatron.common.files import read_json, write_json, write_whole, written_whole
from sla_megatron.common.tables import table

from ..record import ROOT

MADE_BY = "benchmarks.gpu_report"

#: A row's ``status``.  One that runs, and is still said to at the next call, was ended with the whole report.
RUNNING, DONE, FAILED, CUT = "running", "done", "failed", "cut"
NO_TIME, NO_GPUS = "no time", "too few GPUs"

_REPORT, _TEXT, _LOCK, _TMP = "report.json", "report.txt", ".lock", "tmp"
_ARCHIVED = frozenset({".json", ".txt", ".svg", ".log"})
#: Sockets are made in the temporary folder, with names of 33 characters, and a socket's path has 107 at most; below
#: a folder with a longer path the system's is taken.
_LONGEST_PATH = 74
#: What decides what a row measures.
_SOURCES = ("sla_megatron/**/*.py", "benchmarks/**/*.py", "tests/**/*.py", "examples/**/*.py", "launch/presets/*.flags")


class Folder:
    """``--out``; nothing is written before :meth:`enter`.

    Args:
        out: the folder.

    Raises:
        FlagError: where it, or the archive beside it, is not this command's.
    """

    def __init__(self, out: Path) -> None:
        self.out = out.absolute()
        self.archive = self.out.with_name(f"{self.out.name}.tar.gz")
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise FlagError("--out", out, "a folder")
        report = self._read()
        if (foreign := self._foreign(report)) is not None:
            raise FlagError("--out", out, f"a new folder, an empty one or one of this command: {foreign} is not its")
        if report is None and self.archive.exists():
            raise FlagError("--out", out, f"a folder beside which there is no {self.archive.name}")
        #: Row -> what the report says of it.
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in (report or {}).get("rows", [])}
        self.about: dict[str, Any] = {}
        #: Temporary files and caches of the rows.
        self.tmp = self.out / _TMP

    def of(self, row: str) -> Path:
        return self.out / row

    @contextlib.contextmanager
    def enter(self, about: dict[str, Any]) -> Iterator[None]:
        """Within the block the folder is this process's; at its end, however it comes, the archive is there.

        Raises :class:`FlagError` where another process has it, or it cannot be made.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = (self.out / _LOCK).open("w")
        except OSError as error:
            raise FlagError("--out", self.out, f"a folder that can be written to ({error.strerror})") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FlagError("--out", self.out, "a folder that no other report is written to") from None
            if len(str(self.tmp)) > _LONGEST_PATH:
                self.tmp = Path(tempfile.mkdtemp(prefix="sla-gpu-report-"))
            self.about = about
            self._write()
            try:
                yield
            finally:
                shutil.rmtree(self.tmp, ignore_errors=True)
                self._write()
                self.pack()

    def begin(self, row: str) -> Path:
        """An empty folder for the row, which is said to run."""
        shutil.rmtree(self.of(row), ignore_errors=True)
        self.record(row, status=RUNNING)
        self.of(row).mkdir()
        self.tmp.mkdir(exist_ok=True)
        return self.of(row)

    def record(self, row: str, **what: Any) -> None:
        """Put down how the row went, and what it wrote."""
        files = sorted(str(path.relative_to(self.out)) for path in self.of(row).rglob("*") if path.is_file())
        self.rows[row] = {"name": row, **what, "files": files}
        self._write()

    def pack(self) -> None:
        """Write the archive: logs, JSON, pictures; never weights, which no row leaves here."""
        with written_whole(self.archive) as unfinished, tarfile.open(unfinished, "w:gz") as archive:
            for path in sorted(self.out.rglob("*")):
                if path.suffix in _ARCHIVED and path.is_file() and _TMP not in path.relative_to(self.out).parts[:1]:
                    archive.add(path, f"{self.out.name}/{path.relative_to(self.out)}")

    def text(self) -> str:
        """The rows as a table."""
        lines = [(row["name"], row["status"], _seconds(row), row.get("said", "")) for row in self.rows.values()]
        return table(("row", "status", "seconds", ""), lines, (0, 1, 3))

    def _write(self) -> None:
        write_json(self.out / _REPORT, {"made_by": MADE_BY, **self.about, "rows": list(self.rows.values())})
        write_whole(self.out / _TEXT, self.text() + "\n")

    def _read(self) -> dict[str, Any] | None:
        try:
            report = read_json(self.out / _REPORT)
        except (OSError, ValueError):
            return None
        return report if isinstance(report, dict) and report.get("made_by") == MADE_BY else None

    def _foreign(self, report: dict[str, Any] | None) -> str | None:
        """The first thing in the folder that this command did not put there."""
        if not self.out.is_dir():
            return None
        rows = {row["name"]: row for row in report["rows"]} if report else {}
        known = {_LOCK} | ({_REPORT, _TEXT, _TMP} if report else set())
        for path in sorted(self.out.iterdir()):
            if path.name in known:
                continue
            row = rows.get(path.name)
            if row is None or path.is_symlink() or not path.is_dir():
                return path.name
            if row["status"] != RUNNING:
                for file in path.rglob("*"):
                    name = str(file.relative_to(self.out))
                    if not file.is_dir() and name not in row["files"]:
                        return name
        return None


def _seconds(row: dict[str, Any]) -> str:
    return "" if row.get("seconds") is None else f"{row['seconds']:.0f}"


def fingerprint(command: Iterable[str], device: str) -> str:
    """The same for the same command on the same device and the same sources: what was done then is done."""
    return hashlib.sha256("\0".join([*command, device, _sources()]).encode()).hexdigest()[:16]


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _SOURCES for path in ROOT.glob(pattern)}):
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
