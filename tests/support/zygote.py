"""Ranks that need not import Megatron: one process does so, and is then forked for each.

The imports cost some eight seconds of a core.  A forked rank runs its worker as ``__main__``, with its environment, log
and session, and ends as Python ends.  What differs from processes of their own: all hash strings with the same seed.

Requests and answers are lines of JSON, one answer for each request.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from .parsed_sources import parse_ahead

#: What differs between the ranks of one environment, or between tests; no import looks at these.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST")

#: The last ones are imported by a run, the first of which takes seconds.
IMPORTED = (
    "megatron.training.training",
    "sla_megatron.flags.arguments",
    "sla_megatron.training.loss",
    "sla_megatron.model.builder",
    "sla_megatron.model.report",
    "megatron.core.tokenizers.text",
    "megatron.core.models.mimo",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
)


class ForkedRank:
    """A forked rank, as the process that asked for it sees it: what tests use of ``subprocess.Popen``."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._zygote = zygote
        # It is nobody else's number until its status was asked for.
        self._ended = os.pidfd_open(pid)

    def poll(self) -> int | None:
        return self._status(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"rank of pid {self.pid}", timeout)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _status(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            os.close(self._ended)
            self.returncode = self._zygote.ask(wait_for=self.pid)
        return self.returncode


class Zygote:
    """The process that is forked, started in ``environment`` and ``folder``."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self.environment = _shared(environment)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=self.environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for pytest, which ends the ranks.
            start_new_session=True,
        )
        atexit.register(self.close)
        #: What imports add to the environment; ``None`` if they failed.
        self.added: dict[str, str] | None = self._answer()
        if self.added is None:
            warnings.warn("ranks start slowly: the process to fork them from has threads, or failed", stacklevel=2)

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether a rank with ``environment`` would have imported the same."""
        return self.added is not None and self.added | _shared(environment) == self.added | self.environment

    def fork(self, module: str, argv: list[str], environment: Mapping[str, str], log: Path) -> ForkedRank:
        """Run ``python -m module argv`` in a child; it writes to ``log``."""
        log.write_bytes(b"")
        return ForkedRank(
            self, self.ask(module=module, argv=argv, environment=dict(environment), log=str(log.absolute()))
        )

    def ask(self, **request: Any) -> Any:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End it, and what is left of its ranks."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        return json.loads(line) if line else None


def _shared(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in OF_A_RANK}


# The rest runs in the process that is forked, and in its children.


def import_all() -> None:
    """What workers import of Megatron, now or in a run, as they do: on the CPU backend, which is left again.

    And what the trainer's worker has parsed once.
    """
    from sla_megatron.cpu.device import megatron_device

    with megatron_device(["--device", "cpu"]):
        for name in IMPORTED:
            importlib.import_module(name)
        parse_ahead()


def serve(answers: TextIO) -> dict[str, Any]:
    """Answer requests.  Returns in the children alone: what each is to run; the process itself ends with its input."""
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait_for" in request:
            running.discard(request["wait_for"])
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait_for"], 0)[1])
        else:
            answer = _fork_session()
            if not answer:
                return request
            running.add(answer)
        print(json.dumps(answer), file=answers, flush=True)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
    sys.exit()


def _fork_session() -> int:
    """``os.fork``; the child leads a session, and can be ended with it, by the time that its parent goes on."""
    done, child_has = os.pipe()
    pid = os.fork()
    if not pid:
        os.setsid()
        os.close(done)
    os.close(child_has)
    if pid:
        os.read(done, 1)
        os.close(done)
    return pid


def become(request: dict[str, Any], answers: TextIO, added: Mapping[str, str]) -> None:
    """In a child: what a new process of its own would have."""
    null, log = os.open(os.devnull, os.O_RDONLY), os.open(request["log"], os.O_WRONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)
    answers.close()
    os.environ.clear()
    os.environ.update({**added, **request["environment"]})
    # From the system, as at a start.  Python's own does so by itself.
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    sys.argv = [request["module"], *request["argv"]]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    # Imports may print.
    os.dup2(2, 1)
    before = dict(os.environ)
    import_all()
    added = {name: value for name, value in os.environ.items() if before.get(name) != value}
    if len(os.listdir("/proc/self/task")) > 1:
        # A child would have none of them, and the locks that they hold.
        sys.exit("threads were started by imports")
    # Their pages stay shared, and no collection in a child goes over them.
    gc.collect()
    gc.freeze()
    # Or extension modules would complain, as Python ends, of what is left.
    atexit.register(gc.unfreeze)
    print(json.dumps(added), file=answers, flush=True)
    request = serve(answers)
    become(request, answers, added)
    # What it raises, SystemExit too, ends this process as it would end a new one.
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
