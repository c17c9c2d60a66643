"""A sweep that is told to end lets its run end, and begins no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sla_megatron.commands.sweep import local
from sla_megatron.commands.sweep.grid import read_grid
from sla_megatron.commands.sweep.results_folder import SweepFolder
from sla_megatron.commands.sweep.training import _forwarding_signals

GRID = """
{flags: [--global-batch-size 1], sizes: {s: --num-layers 4 --hidden-size 8 --num-attention-heads 2}, context: 8,
 tokens: 64, seeds: [1, 2, 3]}
"""


def test_no_run_begins_after_a_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    runs = read_grid(tmp_path / "grid.yaml", [])
    begun = []

    def train(sweep: SweepFolder, run: object, *_: object) -> dict[str, float]:
        begun.append(run.name)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"validation_loss": 1.0, "tokens_per_second": 1.0}

    monkeypatch.setattr(local, "train", train)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        local.run_all(SweepFolder(tmp_path / "out"), runs, 1, print)
    assert begun == [run.name for run in runs[:2]] and len(runs) == 3
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_reaches_the_training_and_the_sweep() -> None:
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
            with _forwarding_signals(process):
                os.kill(os.getpid(), signal.SIGTERM)
                assert process.wait(20) == -signal.SIGTERM
        assert told == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
