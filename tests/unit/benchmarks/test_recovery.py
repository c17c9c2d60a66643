"""What a fault on Slurm cost, read off a real run's log: lines of it as they came, with Slurm's own times."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.recovery import KINDS, Watch, pattern, row_of, tables
from benchmarks.recovery_log import PARTS, Attempt, attempts, read_events, recoveries

EXCERPT = (Path(__file__).parents[2] / "data" / "recovery.log").read_text()

ARGS = {"faults": 3, "kinds": list(KINDS), "seed": 1, "iterations": 60, "save_interval": 10}


def test_parts_add_up_and_are_what_others_measured() -> None:
    """The whole is from the fault to a step that was not there before; imports are Megatron's own figure of them."""
    found = list(recoveries(attempts(read_events(EXCERPT))))
    assert [row["fault"] for row in found] == re.findall(r"recovery: fault (\w+)", EXCERPT)
    # Slurm took the job back once, when it lost a node.
    assert {row["fault"]: row["seconds"]["requeue"] > 1 for row in found} == {
        "node": True,
        "kill": False,
        "damage": False,
    }
    megatrons = [float(text) / 1000 for text in re.findall(r"startup-library-setup \.*: \([\d.]+, ([\d.]+)\)", EXCERPT)]
    for row, most in zip(found, megatrons[1:], strict=True):
        assert tuple(row["seconds"]) == tuple(PARTS)
        assert sum(row["seconds"].values()) == pytest.approx(row["all_seconds"], abs=1e-6)
        assert min(row["seconds"].values()) > -0.05
        # Megatron's is that of the slowest rank, and the marks are one rank's.
        assert 0.7 * most < row["seconds"]["imports"] <= most + 0.05
        assert len(row["rank_cpu_seconds"]) == 2


def test_a_fault_without_a_new_step_is_no_recovery() -> None:
    lines = EXCERPT.splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if "sla-job: attempt" in line and "of this run" in line)
    with pytest.raises(ValueError, match="attempt 4 has no launch"):
        list(recoveries(attempts(read_events("".join(lines[: last + 1])))))
    # It comes no further than the one before it did.
    steps = [Attempt(steps=[(0.0, 7, 1.0)], fault="kill", fault_at=1.0, ended=2.0)]
    marks = dict.fromkeys(("script", "launch", "imports", "initialisation", "load", "data"), 3.0)
    with pytest.raises(ValueError, match="attempt 2 has no new step"):
        list(recoveries([*steps, Attempt(marks=marks, steps=[(4.0, 7, 1.0)])]))


def test_a_row_and_its_table() -> None:
    row = row_of(Namespace(**ARGS, launch="torchrun", async_saves=False), read_events(EXCERPT))
    assert row["attempts"] == 4 and 0 < row["useful_fraction"] < 1
    assert row["useful_fraction"] == pytest.approx(60 * row["step_seconds"]["median"] / row["wall_seconds"])
    refused = {"launch": "srun", "async_saves": True, "refused": "no --async-save without a GPU"}
    made, not_made = tables({"rows": [row, refused], "settings": {"note": "Shared."}})
    assert "Shared." in made.note and len(made.rows) == len(PARTS) + 3
    assert not_made.rows == [["no --async-save without a GPU"]]


def test_a_fault_waits_for_a_step_that_is_new_after_the_last_one() -> None:
    """Also where the ranks went on for a while after it."""
    watch = Watch(SimpleNamespace(nodes=[], folder=Path()), Path("run"))
    ended = SimpleNamespace(job=lambda job: {"JobState": "FAILED"})
    lines = {1: "1: [default0]: iteration 21/ 60 | elapsed time per iteration (ms): 21.0 |"}
    lines |= {step: lines[1].replace("21", str(step)) for step in (22, 23, 24)}
    attempt = "sla-job: attempt {} of this run, job 1 on node[1-2]"
    for said in (
        attempt.format(1),
        lines[1],
        "recovery: fault kill",
        lines[22],
        lines[23],
        attempt.format(2),
        lines[22],
    ):
        watch.lines.append((0.0, said))
    watch.lines += [(0.0, lines[23]), (0.0, lines[24])]
    assert watch.reach(ended, "1", 22) == 0.024
    del watch.lines[-1]
    assert watch.reach(ended, "1", 22) is None


@pytest.mark.parametrize("seed", range(5))
def test_faults_are_drawn_where_there_is_a_checkpoint_to_lose(seed: int) -> None:
    """Two checkpoints before the first, steps between all, each kind once; the same again from the same seed."""
    drawn = pattern(Namespace(**ARGS | {"seed": seed}))
    assert drawn == pattern(Namespace(**ARGS | {"seed": seed})) != pattern(Namespace(**ARGS | {"seed": seed + 5}))
    steps = [step for step, _, _ in drawn]
    assert steps[0] > 20 and steps[-1] < 60 and all(b - a >= 2 for a, b in zip(steps, steps[1:], strict=False))
    assert sorted(kind for _, kind, _ in drawn) == sorted(KINDS)
