"""Logs of runs that were made elsewhere, as a result of ``benchmarks.loss``."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import loss, loss_logs
from benchmarks.record import ROOT

MADE = ROOT / "benchmarks" / "results" / "loss-gpu-124m-4k"


def test_the_committed_result_is_what_its_logs_say() -> None:
    """Each loss stands in its log as it stands in the result, by another way of reading."""
    result = json.loads(MADE.with_suffix(".json").read_text())
    index = json.loads((MADE / "runs.json").read_text())
    assert result["rows"] == loss_logs.read_runs(MADE)["rows"]
    for row in result["rows"]:
        text = (MADE / index["runs"][row["variant"]]["log"]).read_text()
        assert re.findall(r"on validation set \| lm loss value: (\S+)", text) == [f"{row['validation_loss']:.6E}"]
        assert re.findall(r"lm loss: (\S+)", text) == [f"{value:.6E}" for _, value in row["train_losses"]]
        assert (row["tokens"], row["iterations"]) == (200 * 16 * 4096, 200)
    assert result["commit"] == index["commit"] and result["machine"]["device"] == "NVIDIA H200"


def test_one_seed_is_shown_as_one(tmp_path: Path) -> None:
    result = json.loads(MADE.with_suffix(".json").read_text())
    (table,) = loss.tables(result)
    assert "no spread" in table.note and "tokens/s" not in table.header
    assert [cells[-1] for cells in table.rows] == ["", "-0.0419", "-0.0321"]
    loss.plot(result, tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()[:2000]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"commit": None}, "runs.json lacks commit"),
        ({"runs": {"full": {"log": "dense.log"}}}, "runs.json lacks the run dense"),
        ({"runs": {"dense": {"log": "none.log"}}}, "No such file"),
        ({"runs": {"dense": {"log": "runs.json"}}}, "the log lacks the number of parameters"),
    ],
    ids=["key", "dense", "log", "not a log"],
)
def test_what_is_missing_is_named(
    broken: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, status 2, before anything is written."""
    folder = tmp_path / "logs"
    shutil.copytree(MADE, folder)
    index = json.loads((folder / "runs.json").read_text()) | broken
    kept = {key: value for key, value in index.items() if key not in broken or value is not None}
    (folder / "runs.json").write_text(json.dumps(kept))
    monkeypatch.setattr(sys, "argv", ["loss_logs", str(folder), "--out", str(tmp_path / "loss-x.json")])
    with pytest.raises(SystemExit) as end:
        loss_logs.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and message in last and f"FOLDER {folder}" in last
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
