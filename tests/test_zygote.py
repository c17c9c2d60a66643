"""Ranks that are forked from a process that has imported Megatron are as ranks that import it themselves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support import launch
from tests.support.launch import ROOT, kill_ranks, run_worker, start_ranks
from tests.support.processes import alive
from tests.support.zygote import ForkedRank

pytestmark = pytest.mark.skipif(launch._GPU.exists(), reason="nothing is forked where there is a GPU")


def start(request: Any, folder: Path, world_size: int = 1) -> Sequence[launch.Rank]:
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps(request))
    return start_ranks(["-m", "tests.support.state_worker", str(folder)], world_size, folder)


@pytest.mark.parametrize("module", ["torch._refs", "megatron.training.training"])
def test_what_is_imported_was_compiled_before(module: str) -> None:
    """Where PYTHONDONTWRITEBYTECODE is set and pip has not done it, no process does it for the next: 30 s, not 10."""
    assert Path(find_spec(module).cached).exists()


def test_they_find_what_a_new_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what is drawn at random, which is each rank's own."""
    forked = run_worker("state_worker", 0, 2, tmp_path / "ranks")
    assert (tmp_path / "ranks" / "rank1.log").read_text() == "in the log\nto the end\n"
    monkeypatch.setattr(launch, "_GPU", tmp_path)
    (started,) = run_worker("state_worker", 0, 1, tmp_path / "ranks")[:1]
    answers = (*forked, started)
    drawn = [number for answer in answers for number in answer.pop("own")]
    assert len(set(drawn)) == len(drawn) == 9
    assert [answer["environment"].pop("RANK") for answer in answers] == ["0", "1", "0"]
    assert forked == [started, started]


def test_they_end_as_python_ends(tmp_path: Path) -> None:
    """With the status, or the traceback and 1; or by a signal."""
    (left,) = start(3, tmp_path / "left")
    (raised,) = start("raise", tmp_path / "raised")
    assert isinstance(left, ForkedRank) and (left.wait(60), raised.wait(60)) == (3, 1)
    assert (tmp_path / "raised" / "rank0.log").read_text().endswith("\nRuntimeError: as it was told\n")
    slept, other = start("sleep", tmp_path / "slept", 2)
    assert slept.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        slept.wait(0.1)
    slept.send_signal(signal.SIGTERM)
    assert slept.wait(60) == slept.poll() == -signal.SIGTERM
    kill_ranks([slept, other])
    assert other.wait(60) == -signal.SIGKILL


def test_another_environment_is_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something may look at it as it is imported."""
    monkeypatch.setenv("SLA_TEST_OTHER", "1")
    ranks = start("sleep", tmp_path / "rank")
    kill_ranks(ranks)
    assert isinstance(ranks[0], subprocess.Popen) and ranks[0].wait(60) == -signal.SIGKILL


def test_they_do_not_outlive_who_asked_for_them(tmp_path: Path) -> None:
    """Nor does the process that they are forked from."""
    folder = tmp_path / "rank"
    folder.mkdir()
    (folder / "request.json").write_text('"sleep"')
    script = (
        "import sys, time; from tests.support import launch\n"
        "(rank,) = launch.start_ranks(['-m', 'tests.support.state_worker', sys.argv[1]], 1, launch.Path(sys.argv[1]))\n"
        "print(rank.pid, launch._zygote()._process.pid, flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        process.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
