"""A sweep's folder and commands, without training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sla_megatron.commands.sweep import slurm
from sla_megatron.commands.sweep.cli import main
from sla_megatron.commands.sweep.errors import RunBusy, SweepError
from sla_megatron.commands.sweep.flag_words import Shape
from sla_megatron.commands.sweep.grid import Run, Setting
from sla_megatron.commands.sweep.local import Progress, duration, run_all
from sla_megatron.commands.sweep.results_folder import SweepFolder
from sla_megatron.commands.sweep.training import Launcher
from sla_megatron.commands.sweep.training_log import TrainingLog, read_log

from .sweep_samples import DENSE, HEAD, ROWS, SHAPE, launch, run_of


def begin(folder: Path, *runs: Run) -> SweepFolder:
    sweep = SweepFolder(folder)
    sweep.accept(runs)
    sweep.create()
    for run in runs:
        sweep.run(run).path.mkdir(parents=True)
        sweep.begin(run)
    return sweep


def test_a_folder_takes_its_own_runs_and_no_others(tmp_path: Path) -> None:
    sweep = begin(tmp_path / "out", run_of(), run_of(Setting((2,), 2)))
    sweep.accept([run_of(), run_of(Setting((3,), 2)), run_of(seed=2, lr="3")])
    # A run of its own, but compared with one of other flags.
    for setting in (DENSE, Setting((2,), 2), Setting((3,), 2)):
        with pytest.raises(
            SweepError, match=r"was begun with other flags \(--lr 1, now --lr 2\): expected the same grid"
        ):
            sweep.accept([run_of(setting, lr="2")])
    assert sweep.unfinished() == ["small-c16-dense-s1", "small-c16-n2-k2-s1"] and sweep.rows() == []


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_the_user_made_is_left_alone(what: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if what == "folder":
        out.mkdir()
    (out / "results.jsonl" if what == "folder" else out).write_text("mine")
    with pytest.raises(SweepError, match="out: expected a new folder, or a sweep's"):
        SweepFolder(out).accept([run_of()])


def test_one_process_a_run(tmp_path: Path) -> None:
    sweep, said = begin(tmp_path / "out", run_of()), []
    folder = sweep.run(run_of())
    with folder.locked(said.append), pytest.raises(RunBusy, match="is being trained by another process"):
        with folder.locked(said.append, patience=0.3):
            raise AssertionError("two at once")
    with folder.locked(said.append):
        assert said == ["small-c16-dense-s1: waiting for another process of this run to end"]


def test_rows_are_collected_in_order(tmp_path: Path) -> None:
    sweep = begin(tmp_path / "out")
    for one in ROWS[::-1]:
        folder = sweep.path / "runs" / f"{one['name']}-{one['kv_projection']}"
        folder.mkdir()
        (folder / "row.json").write_text(json.dumps(one))
    rows = sweep.collect()
    assert [json.loads(line) for line in (sweep.path / "results.jsonl").read_text().splitlines()] == rows
    assert sorted(map(str, rows)) == sorted(map(str, ROWS))
    assert [(r["distances"], r["seed"]) for r in rows][:4] == [([], 1), ([], 2), ([], 3), ([2], 1)]


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sweep = begin(tmp_path / "out", run_of())
    folder = str(sweep.path)
    refused(["report", "--out", folder], "no run is finished yet", capsys)
    sweep.run(run_of()).row.write_text(json.dumps(ROWS[0]))
    main(["report", "--out", folder, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"] == [ROWS[0]] and printed["groups"][0]["validation_loss"]["mean"] == 3.0
    refused(["report", "--out", str(tmp_path)], "expected a sweep's folder", capsys)


def refused(command: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        main(command)
    said = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and said[-1].startswith("sla-sweep: error: ") and message in said[-1]


GRID = """
flags: --global-batch-size 2 --micro-batch-size 1 --lr 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 99
  --eval-interval 10 --eval-iters 1
sizes: {small: --num-layers 8 --hidden-size 64 --num-attention-heads 8}
context: 16
tokens: 320
seeds: [1, 2]
sla: [{distance: [2, 6], skip-groups: 4}]
"""


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:'type' is deprecated:DeprecationWarning")
def test_commands_that_train_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, out = tmp_path / "grid.yaml", tmp_path / "a sweep"
    grid.write_text(GRID)
    main(["plan", str(grid)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].split() == ["1", "small-c16-n2-k4-s1", "10", "320"] and printed[-1] == "6 runs, 1,920 tokens"
    monkeypatch.setenv("DRY_RUN", "1")
    submit = ["submit", str(grid), "--out", str(out), "--limit", "2", "--device", "cpu"]
    options = ["--", "--time=1:00:00", "-pgpu"]
    main([*submit, *options])
    command = capsys.readouterr().out
    assert command.startswith("sbatch --array=0-5%2 '--job-name=a sweep' ")
    assert re.search(
        r" --time=1:00:00 -pgpu \S+/launch/sweep.sbatch "
        r"SLA_ROOT=\S+ PYTHON=\S+ '\S+ sweep/grids/\w{12}.yaml' --out '.* sweep' --device cpu$",
        command.strip(),
    )
    refused(["task", str(grid), "--out", str(out), "--index", "6"], "--index 6: expected 0 to 5", capsys)
    refused([*submit[:4], "--limit", "0"], "--limit 0: expected 1 or more", capsys)
    grid.write_text(GRID + "dense: maybe\n")
    for name in ("run", "submit"):
        refused([name, str(grid), "--out", str(out)], "dense: maybe: expected true or false", capsys)
    # Refused by Megatron, before anything is written.
    grid.write_text(GRID.replace("--hidden-size 64", "--hidden-size 65"))
    refused(["run", str(grid), "--out", str(out)], "Megatron does not accept these flags", capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("training", "why"),
    [
        ("echo 'RuntimeError: no luck'; echo bye; exit 7", "ended with status 7: RuntimeError: no luck"),
        # As Megatron does with a broken tracker file.
        ("echo bye", "ended with status 0, but of its log: it says no number of parameters: bye"),
    ],
)
def test_runs_that_fail_are_reported_and_others_go_on(
    training: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{training}\n")
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    monkeypatch.setenv("NPROC", "2")
    sweep = SweepFolder(tmp_path / "out")
    runs = [run_of(), run_of(Setting((2,), 2))]
    sweep.create()
    assert run_all(sweep, runs, 2, print) == 2
    printed = capsys.readouterr().out.splitlines()
    logs = [sweep.run(run).log for run in runs]
    assert printed[-3] == "2 of 2 runs are not finished; the same command tries them again:"
    assert printed[-2:] == [f"  {run.name} {why} (log: {log})" for run, log in zip(runs, logs, strict=True)]
    assert sweep.rows() == [] and all(log.read_text().count("bye") == 1 for log in logs)
    assert logs[0].read_text().startswith("$ bash ")


def test_an_array_is_of_what_is_not_finished(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID)
    runs = [run_of(seed=seed) for seed in range(1, 6)]
    sweep = begin(tmp_path / "out", *runs)
    for run in (runs[0], runs[3]):
        sweep.run(run).row.write_text("{}")
    assert slurm.command(grid, sweep, runs, None, [], [])[1] == "--array=1-2,4"
    for run in runs:
        sweep.run(run).row.write_text("{}")
    assert slurm.command(grid, sweep, runs, None, [], []) is None


def test_what_is_launched(tmp_path: Path) -> None:
    sweep, run = SweepFolder(tmp_path), run_of(Setting((2,), 2))
    saving = Run(*(getattr(run, name) for name in ("size", "setting", "seed", "flags", "iterations")), SHAPE_THAT_SAVES)
    folder = sweep.run(run)
    cache = ["--data-cache-path", str(folder.data_cache)]
    saved = ["--save", str(folder.checkpoints), "--load", str(folder.checkpoints)]
    for launcher, one, more in (
        (Launcher.local(3), run, cache),
        (Launcher.local(3), saving, [*cache, *saved]),
        (Launcher.slurm(), run, [*cache, "--save-interval", "10"]),
        (Launcher.slurm(), saving, cache),
    ):
        assert launcher.command(one, folder)[2:] == [*more, *run.flags]
    assert Launcher.local(3).overrides(folder)["NPROC"] == "3"
    environment = Launcher.slurm().overrides(folder)
    assert environment["RUN_DIR"] == str(folder.path) and environment["CHECKPOINTS"] == str(folder.checkpoints)


SHAPE_THAT_SAVES = Shape(8, 8, 4, 16, 2, 1, 5)


def test_progress_says_how_long() -> None:
    said: list[str] = []
    runs = [run_of(seed=seed) for seed in (1, 2)]
    progress = Progress(said.append, runs, every=0)
    progress._began -= 100
    log = read_log([*HEAD, *launch(1, 5)])
    progress(runs[0], TrainingLog())
    progress(runs[0], log)
    progress(runs[0], log)
    # Half of the first in 100 s: three halves are left.
    assert said == ["[1/2] small-c16-dense-s1: iteration 5/10, loss 3.7500; about 5 min left of all"]
    # A whole one in 100 s: a whole one is left.
    assert progress.finished(runs[0]) == "about 2 min left of all"
    assert progress.finished(runs[1]) == "nothing left"
    early = Progress(said.append, [Run("small", DENSE, 1, (), 1000, SHAPE)], every=0)
    early(early.runs[0], log)
    assert said[-1].endswith("iteration 5/1000, loss 3.7500; time left not known yet")
    assert [duration(s) for s in (42, 170, 7500)] == ["42 s", "3 min", "2 h 05 min"]
