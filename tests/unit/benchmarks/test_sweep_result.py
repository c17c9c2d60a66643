"""What a sweep's rows become: the table with paired intervals, and losses against tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import loss_by_tokens, sweep
from sla_megatron.commands.sweep.summary import groups
from tests.unit.commands.sweep.sweep_samples import END, HEAD, launch, row

#: Two seeds; differences -0.2 and -0.1: mean -0.15, s = 0.1 / sqrt(2), s / sqrt(2) = 0.05, t = 12.7062.
ROWS = [row([], 0, 1, 3.0), row([], 0, 2, 3.2), row([6], 2, 1, 2.8), row([6], 2, 2, 3.1)]


def with_losses(made: dict[str, Any], *losses: float) -> dict[str, Any]:
    return made | {"validation_losses": [[100 * (i + 1), loss] for i, loss in enumerate(losses)]}


def test_the_table_has_intervals_and_no_speed() -> None:
    (table,) = sweep.tables({"rows": ROWS})
    assert "tokens/s" not in table.header and "less dense" not in table.header
    dense, sla = (dict(zip(table.header, cells, strict=True)) for cells in table.rows)
    assert [dense[name] for name in ("distance", "less dense (95 % interval)", "p", "below")] == ["dense", "", "", ""]
    assert sla["less dense (95 % interval)"] == "-0.1500 (-0.7853 to +0.4853)"
    # With one degree of freedom p = 1 - 2 atan(t) / pi, and t = 3.
    assert (sla["p"], sla["below"], sla["distance"]) == ("0.205", "2 of 2", "6")


def test_losses_by_tokens_come_from_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run whose log is gone, the row's loss alone."""
    folder, out = tmp_path / "runs", tmp_path / "sweep-here.json"
    for number, made in enumerate(ROWS[:2]):
        run = folder / "runs" / made["name"]
        run.mkdir(parents=True)
        (run / "row.json").write_text(json.dumps(made | {"iterations": 10}))
        if number == 0:
            within = "validation loss at iteration 5 | lm loss value: 3.5E+00 | lm loss PPL: 2.0E+01 | "
            (run / "train.log").write_text("\n".join([*HEAD, *launch(1, 5), within, *launch(6, 10), *END]))
    (folder / "sweep.json").write_text('{"sla-sweep": 1}')
    monkeypatch.setattr(sys, "argv", ["sweep", str(folder), "--out", str(out)])
    monkeypatch.setattr(sweep, "plot", None)
    sweep.main()
    found = {made["seed"]: made["validation_losses"] for made in json.loads(out.read_text())["rows"]}
    assert found == {1: [[160, 3.5], [320, 2.5]], 2: [[320, 3.2]]}
    assert "less dense (95 % interval)" in capsys.readouterr().out


def test_a_curve_is_paired_by_seed() -> None:
    made = [with_losses(each, 5.0 + each["seed"], each["validation_loss"]) for each in ROWS]
    dense, sla = (loss_by_tokens.by_seed(made, group) for group in groups(made))
    assert dense == {1: {100: 6.0, 200: 3.0}, 2: {100: 7.0, 200: 3.2}}
    found = loss_by_tokens.less(sla | {3: {100: 1.0}}, dense)
    assert found == {1: {100: 0.0, 200: pytest.approx(-0.2)}, 2: {100: 0.0, 200: pytest.approx(-0.1)}}


def test_what_the_picture_of_tokens_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest context alone; means over the seeds, differences below."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    made = [with_losses(each, 5.0, each["validation_loss"]) for each in ROWS]
    short = [each | {"context": 8} for each in made]
    sweep.plot({"rows": [*short, *made]}, tmp_path / "sweep-cpu.svg")
    names = {"sweep-cpu.svg", "sweep-cpu-heads.svg", "sweep-cpu-tokens.svg"}
    assert {path.name for path in tmp_path.iterdir()} == names
    above, below = drawn[-1].axes
    assert above.get_title(loc="left") == "small, context 16"
    lines = {line.get_label(): line for line in above.lines}
    assert list(lines) == ["dense", "distance 6, 4 of 8 heads"]
    assert lines["dense"].get_ydata() == pytest.approx([5.0, 3.1]) and list(lines["dense"].get_xdata()) == [100, 200]
    assert below.lines[0].get_ydata() == pytest.approx([0.0, -0.15])


def test_without_evaluations_there_is_no_such_picture(tmp_path: Path) -> None:
    sweep.plot({"rows": ROWS}, tmp_path / "sweep-cpu.svg")
    assert not (tmp_path / "sweep-cpu-tokens.svg").exists()
