"""What a fault on Slurm cost, read off a real run's log: lines of it as they came, with Slurm's own times."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.recovery_log import PARTS, attempts, read_events, recoveries

EXCERPT = (Path(__file__).parents[2] / "data" / "recovery.log").read_text()


def test_parts_add_up_and_are_what_others_measured() -> None:
    """The whole is from the fault to a step that was not there before; imports are Megatron's own figure of them."""
    events = read_events(EXCERPT)
    found = list(recoveries(attempts(events)))
    assert [row["fault"] for row in found] == re.findall(r"recovery: fault (\w+)", EXCERPT)
    megatrons = [float(text) / 1000 for text in re.findall(r"startup-library-setup \.*: \([\d.]+, ([\d.]+)\)", EXCERPT)]
    for row, most in zip(found, megatrons[1:], strict=True):
        assert tuple(row["seconds"]) == tuple(PARTS)
        assert sum(row["seconds"].values()) == pytest.approx(row["all_seconds"], abs=1e-6)
        assert min(row["seconds"].values()) > -0.05
        # Megatron's is that of the slowest rank, and the marks are rank 0's.
        assert 0.7 * most < row["seconds"]["imports"] <= most + 0.05
        assert len(row["rank_cpu_seconds"]) == 2
