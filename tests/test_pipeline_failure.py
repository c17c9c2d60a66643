"""Pipelines that go wrong: a rank that dies, ranks that disagree, what is not supported."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import free_ports, kill_ranks, run_worker, start_ranks
from tests.support.pipelines import MODELS, TWO_RANKS
from tests.support.runs import argv

pytestmark = pytest.mark.distributed

SAVE_INTERVAL, KILLED_AFTER, LAST = 8, 10, 16

MODEL = MODELS["gqa-full-long-and-short"]

#: Seconds in which the other ranks must have ended: far less than the process group's own time-out, ten minutes.
SOON = 60


def _argv(**flags: Any) -> list[str]:
    base = MODEL.argv() | TWO_RANKS["pp2v2"].argv() | {"train_iters": LAST, "eval_iters": 0}
    return argv(**base | {"save_interval": SAVE_INTERVAL} | flags)


def _num_steps(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_rank_that_dies_ends_the_job(tmp_path: Path) -> None:
    """SIGKILL of one rank within a step: the other ends by itself, with an error; the last checkpoint resumes."""
    saved = {"save": tmp_path / "killed", "load": tmp_path / "killed"}
    killed = {"argv": _argv(**saved)}
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps({"killed": killed | {"port": free_ports(1)[0]}}, default=str))
    ranks = start_ranks(["-m", "tests.support.trainer_worker", str(folder)], 2, folder)
    try:
        deadline = time.monotonic() + 240
        while _num_steps(folder / "killed.jsonl") < KILLED_AFTER:
            assert time.monotonic() < deadline, (folder / "rank0.log").read_text()[-4000:]
            assert all(rank.poll() is None for rank in ranks), (folder / "rank0.log").read_text()[-4000:]
            time.sleep(0.005)
        ranks[1].send_signal(signal.SIGKILL)
        assert ranks[0].wait(timeout=SOON) not in (0, None)
    finally:
        kill_ranks(ranks)
    assert _num_steps(folder / "killed.jsonl") < 2 * SAVE_INTERVAL, "it was killed between two saves"

    first, second = free_ports(2)
    whole = {"argv": _argv(save=tmp_path / "whole"), "port": first}
    resumed = killed | {"port": second}
    (_, last) = run_worker("trainer_worker", {"whole": whole, "resumed": resumed}, 2, tmp_path / "second")
    assert last["resumed"]["iteration"] == list(range(SAVE_INTERVAL + 1, LAST + 1))
    for what in ("loss", "grad_norm"):
        assert last["resumed"][what] == last["whole"][what][SAVE_INTERVAL:]


def _logs_of_a_failure(request: dict[str, Any], folder: Path) -> list[str]:
    """What each rank printed, once both have ended with an error by themselves."""
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps({"run": request | {"port": free_ports(1)[0]}}))
    ranks = start_ranks(["-m", "tests.support.trainer_worker", str(folder)], 2, folder)
    try:
        for rank in ranks:
            assert rank.wait(timeout=2 * SOON) not in (0, None)
    finally:
        kill_ranks(ranks)
    return [(folder / f"rank{rank}.log").read_text() for rank in range(2)]


def test_ranks_that_disagree_say_so(tmp_path: Path) -> None:
    """Other flags on one rank, which would have it wait for tensors that never come: an error on both, with both."""
    argvs = [_argv(sla_skip_distance=[distance, 2]) for distance in (6, 5)]
    for text in _logs_of_a_failure({"argv_by_rank": argvs}, tmp_path / "ranks"):
        assert "the ranks of one pipeline do not agree on what crosses layers" in text
        assert "skip_distances=(6, 2)" in text
        assert "skip_distances=(5, 2)" in text


def test_a_batch_of_another_length_says_so(tmp_path: Path) -> None:
    """Both shapes, from the rank that would have sent it; the other does not wait for ever."""
    request = {"argv": _argv(), "entry": "tests/support/short_batches.py"}
    first, _ = _logs_of_a_failure(request, tmp_path / "ranks")
    assert "shape (12, 2, 32), expected (16, 2, 32) from --seq-length" in first
