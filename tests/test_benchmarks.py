"""Each benchmark runs at a tiny size; its figures are checked where they are exact, and for being honest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT, free_ports, rank_environment

pytestmark = pytest.mark.distributed


def test_pipeline_step_time(tmp_path: Path) -> None:
    """Bytes are the formula's, no host synchronisation is added, and every timed step is in the figures."""
    figures = tmp_path / "figures.json"
    sizes = ["--layers", "8", "--hidden", "32", "--heads", "4", "--seq-length", "16", "--microbatches", "2"]
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", str(free_ports(1)[0]), "benchmarks/pipeline_step_time.py", "--device", "cpu"),
            *(*sizes, "--steps", "2", "--json", str(figures)),
        ],
        check=True,
        cwd=ROOT,
        env=rank_environment(0, 1, 0),
        timeout=300,
        capture_output=True,
    )
    plain, interleaved = json.loads(figures.read_text())["rows"]
    assert (plain["layout"], interleaved["layout"]) == ("PP=2", "PP=2 x VPP=2")
    for row, num_hops, num_carrying in ((plain, 1, 1), (interleaved, 3, 1)):
        assert row["device"] == "cpu"
        assert row["num_steps"] == 2
        assert row["synchronisations"]["sla"] == row["synchronisations"]["dense"] > 0
        # Forward and backward, 2 microbatches of fp32; K/V of 3 groups of layers 1 and 2.
        hidden, kv = 16 * 32, 2 * (2 * 16 * 3 * 8)
        assert row["sent_bytes"]["dense"] == 2 * 2 * 4 * num_hops * hidden
        assert row["sent_bytes"]["sla"] == 2 * 2 * 4 * (num_hops * hidden + num_carrying * kv)
        for seconds in row["seconds"].values():
            assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        assert row["ratio"] == row["seconds"]["sla"]["median"] / row["seconds"]["dense"]["median"]
