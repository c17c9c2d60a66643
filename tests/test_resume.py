"""A run that is killed between two saves goes on, bit for bit, as if it had not been."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.support.launch import free_ports, kill_ranks, run_worker, start_ranks
from tests.support.runs import argv

pytestmark = pytest.mark.distributed

SAVE_INTERVAL, KILLED_AFTER, LAST = 12, 14, 24
# Dropout stays on, at Megatron's 0.1: its random state must come back as well.
SLA = {"sla": True, "sla_skip_distance": 2, "train_iters": LAST, "eval_iters": 0, "save_interval": SAVE_INTERVAL}


def _steps(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_sigkill_between_saves(tmp_path: Path) -> None:
    """SIGKILL of every rank after step 14; the relaunch starts at step 13 and repeats the exact losses and norms."""
    saved = {"save": tmp_path / "killed", "load": tmp_path / "killed"}
    killed = {"argv": argv(**SLA, **saved)}
    folder = tmp_path / "first"
    folder.mkdir()
    request = {"killed": killed | {"port": free_ports(1)[0]}}
    (folder / "request.json").write_text(json.dumps(request))
    ranks = start_ranks(["-m", "tests.support.trainer_worker", str(folder)], 2, folder)
    try:
        deadline = time.monotonic() + 240
        while len(_steps(folder / "killed.jsonl")) < KILLED_AFTER:
            assert time.monotonic() < deadline, (folder / "rank0.log").read_text()[-4000:]
            assert all(rank.poll() is None for rank in ranks), (folder / "rank0.log").read_text()[-4000:]
            time.sleep(0.005)
    finally:
        kill_ranks(ranks)
    before = _steps(folder / "killed.jsonl")
    assert KILLED_AFTER <= len(before) < 2 * SAVE_INTERVAL, "it was killed between two saves"

    first, second = free_ports(2)
    whole = {"argv": argv(**SLA, save=tmp_path / "whole"), "port": first}
    answers, _ = run_worker(
        "trainer_worker", {"whole": whole, "resumed": killed | {"port": second}}, 2, tmp_path / "second"
    )
    whole, resumed = answers["whole"], answers["resumed"]
    assert [step["loss"] for step in before] == whole["loss"][: len(before)]
    assert resumed["iteration"] == list(range(SAVE_INTERVAL + 1, LAST + 1))
    assert resumed["loss"] == whole["loss"][SAVE_INTERVAL:]
    assert resumed["grad_norm"] == whole["grad_norm"][SAVE_INTERVAL:]
