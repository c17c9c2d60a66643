"""What the tests of the examples that train two models side by side have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from scipy import stats

from benchmarks.record import Table

from .launch import run_worker

#: Of every example, whose heads are 8.
BAD_FLAGS = [
    (["--layers", "0"], "--layers 0: expected an integer of 1 or more"),
    (["--steps", "few"], "--steps few: expected an integer of 1 or more"),
    (["--hidden", "60"], "--hidden 60: expected a multiple of 16: 8 heads of even size"),
    (["--skip-groups", "9"], "--skip-groups 9: expected an integer from 0 to 8"),
    (["--distance", "1", "2", "--skip-groups", "1"], "--distance 1 2: expected at most as many as skip groups, 1"),
    (["--device", "tpu"], "--device tpu: expected"),
    (["--out", "result.txt"], "--out result.txt: expected a name that ends in .json"),
    (["--heads"], "--heads without a value: expected one value"),
]


def run_example(name: str, folder: Path, flags: Sequence[str]) -> tuple[dict[str, Any], str]:
    """What ``python -m examples.NAME.run`` writes to ``folder/NAME.json``, and what it prints."""
    out = folder / f"{name}.json"
    argv = [*flags, "--device", "cpu", "--out", str(out)]
    run_worker("example_worker", {"example": name, "argv": argv}, 1, folder)
    return json.loads(out.read_text()), (folder / "rank0.log").read_text()


def check_refusal(
    main: Callable[[list[str]], None], argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, status 2, before anything is trained."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def check_row(row: dict[str, Any], steps: int) -> None:
    """One seed's figures, where they are known."""
    assert row["parameters"]["dense"] == row["parameters"]["sla"] > 0
    start, *_, end = row["curve"]
    assert (start["step"], end["step"], len(row["curve"])) == (0, steps, 6)
    # Of the same weights SLA makes another function.
    assert start["dense"] != start["sla"] and start["dense"]["loss"] != end["dense"]["loss"]
    for name in ("dense", "sla"):
        assert 0.0 < end[name]["loss"] < 10.0 and 0.0 <= end[name]["accuracy"] <= 1.0
        assert 0.0 < row["seconds"][name]["min"] <= row["seconds"][name]["median"]
        # Five steps are not timed.
        assert row["seconds"][name]["n"] == row["step_ratio"]["n"] == steps - 5


def check_table(table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """The figures of two seeds or more, and SciPy's word on their differences."""
    loss, accuracy, rate = table.rows
    ends = [row["curve"][-1] for row in rows]
    for cells, quantity in ((loss, "loss"), (accuracy, "accuracy")):
        sla, dense = ([end[name][quantity] for end in ends] for name in ("sla", "dense"))
        test = stats.ttest_rel(sla, dense)
        interval = test.confidence_interval(0.95)
        assert cells[1] == f"{mean(dense):.4f} ({min(dense):.4f} to {max(dense):.4f})"
        assert cells[3] == f"{mean(sla) - mean(dense):+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"
        if quantity == "loss":
            ahead = sum(a < b for a, b in zip(sla, dense, strict=True))
            assert f"SLA has the lower loss with {ahead} of {len(rows)} seeds, p = {test.pvalue:.2g} in" in table.note
    assert rate[3].startswith(f"x {mean(row['step_ratio']['median'] for row in rows):.3f} (")
