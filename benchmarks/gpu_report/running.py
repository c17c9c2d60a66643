"""One row: a process of its own, bounded in time, none of whose helpers outlives it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..record import ROOT
from .folder import CUT, DONE, FAILED
from .rows import FOLDER, Row

#: In the environment of every process of a row, whatever session or parent it has.
_MARK = "SLA_GPU_REPORT_ROW"
#: Of a launcher around this command, which the rows are none of.
_LAUNCHERS = ("SLURM_", "PMI_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_EVERY = 15.0


@dataclass(frozen=True)
class Outcome:
    """How a row went, after how many seconds, and what is to be said of it."""

    status: str
    seconds: float
    said: str


def environment(tmp: Path, device: str) -> dict[str, str]:
    """Of the rows: temporary files and caches are in ``tmp``, nothing is written elsewhere."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    found |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "SLA_TEST_DEVICE": device,
        "TMPDIR": str(tmp),
    }
    caches = {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "MPLCONFIGDIR", "HF_HOME"}
    found |= {name: str(tmp / name.split("_")[0].lower()) for name in caches}
    if "CUDNN_HOME" not in found and (cudnn := _cudnn()) is not None:
        # Transformer Engine takes the system's cuDNN otherwise, beside the one that torch has loaded.
        found["CUDNN_HOME"] = cudnn
    # As Megatron asks for with tensor parallelism.
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} | found


def _cudnn() -> str | None:
    try:
        spec = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return None
    return next(iter(spec.submodule_search_locations), None) if spec and spec.submodule_search_locations else None


def run(row: Row, folder: Path, given: dict[str, str], seconds: float, say: Callable[[str], None]) -> Outcome:
    """Run ``row`` for at most ``seconds``; what it prints goes to ``folder/log.txt``.

    Args:
        row: its command.
        folder: its own.
        given: its environment.
        seconds: after which it is ended.
        say: is told, every few seconds, how it is going.
    """
    # Relative where it can be: results say with which command they were measured.
    place = os.path.relpath(folder, ROOT) if folder.is_relative_to(ROOT) else str(folder)
    command = [sys.executable, *(word.replace(FOLDER, place) for word in row.command)]
    token, log = secrets.token_hex(8), folder / "log.txt"
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=given | {_MARK: token},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = _wait(process, begin, seconds, lambda passed: say(f"{row.name}: {passed:.0f} s: {last_line(log)}"))
        finally:
            end_all(process, token)
    passed = time.monotonic() - begin
    if code is None:
        return Outcome(CUT, passed, f"ended after {passed:.0f} s, needs more: {last_line(log)}")
    results = ", ".join(sorted(path.name for path in folder.glob("*.json")))
    return Outcome(FAILED, passed, last_line(log)) if code else Outcome(DONE, passed, results or last_line(log))


def _wait(process: subprocess.Popen, begin: float, seconds: float, tell: Callable[[float], None]) -> int | None:
    """Its exit status; ``None`` when time is up."""
    told = begin
    while (now := time.monotonic()) < begin + seconds:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(1.0, begin + seconds - now))
        if time.monotonic() - told >= _EVERY:
            told = time.monotonic()
            tell(told - begin)
    return process.poll()


def end_all(process: subprocess.Popen, token: str) -> None:
    """End what is left of a row: its group, and what it started in sessions of their own, as launchers do."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # One that is just being started may be missed the first time.
    for _ in range(5):
        left = list(_marked(token))
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            break
        time.sleep(0.05)


def _marked(token: str) -> Iterator[int]:
    """Processes of this user with the mark in their environment; on Linux."""
    mark = f"{_MARK}={token}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def last_line(log: Path) -> str:
    """The last line of what was printed that says something; shortened."""
    lines = log.read_bytes()[-20_000:].decode(errors="replace").splitlines()
    said = (re.sub(r"\s+", " ", line).strip(" =") for line in reversed(lines))
    return next((line for line in said if re.search(r"\w", line)), "")[:160]
