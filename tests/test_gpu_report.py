"""``make gpu-report`` on a processor, with a row that trains; its rules are in ``tests/unit/benchmarks``."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.launch import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def _report(out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--device", "cpu", "--minutes", "5", "--rows", "loss"]
    return subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_loss_run_in_an_archive(tmp_path: Path) -> None:
    """Dense and skip-layer are trained; logs, JSON and versions come back, no weights; again nothing is run."""
    out = tmp_path / "out"
    done = _report(out)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive.getmembers()}
    assert set(files) == {
        *("out/report.json", "out/report.txt", "out/loss/log.txt"),
        *("out/loss/loss-cpu-tiny.json", "out/loss/loss-cpu-tiny.svg"),
    }
    report = json.loads(files["out/report.json"])
    assert {"torch", "cuda", "driver", "apex", "transformer-engine", "megatron-core", "commit"} <= set(
        report["machine"]
    )
    assert (report["machine"]["gpus"], report["rows"][0]["status"]) == ([], "done")
    result = json.loads(files["out/loss/loss-cpu-tiny.json"])
    dense, full = result["rows"]
    assert (dense["variant"], full["variant"]) == ("dense", "full")
    # The quickstart's model: 8 layers of 12 h^2 + 13 h, the last norm, and 512 words padded to a multiple of 128.
    assert dense["parameters"] == full["parameters"] == 8 * (12 * 128**2 + 13 * 128) + 2 * 128 + 512 * 128
    for row in (dense, full):
        assert [iteration for iteration, _ in row["train_losses"]] == [1, 2]
        assert row["tokens"] == 2 * 16 * 128
    # The same weights to begin with: losses are near, and not the same.
    assert dense["validation_loss"] != full["validation_loss"] == pytest.approx(dense["validation_loss"], abs=0.3)
    again = _report(out)
    assert again.returncode == 0 and "loss: done before, kept" in again.stdout
    assert json.loads((out / "report.json").read_text())["rows"] == report["rows"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tar.gz"]
