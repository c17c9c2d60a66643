"""A sweep without training: logs, rows, statistics, tables, plots, folders and commands."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sla_megatron.sweep import slurm
from sla_megatron.sweep.cli import main
from sla_megatron.sweep.errors import RunBusy, SweepError
from sla_megatron.sweep.flag_words import Shape
from sla_megatron.sweep.folder import SweepFolder
from sla_megatron.sweep.grid import Run, Setting
from sla_megatron.sweep.local import Progress, duration, run_all
from sla_megatron.sweep.plot import NAMES, plot
from sla_megatron.sweep.report import as_markdown, as_text
from sla_megatron.sweep.summary import Spread, groups
from sla_megatron.sweep.training import Launcher
from sla_megatron.sweep.training_log import TrainingLog, read_log

SHAPE = Shape(
    num_layers=8, num_heads=8, num_groups=4, context=16, global_batch_size=2, log_interval=1, save_interval=None
)


DENSE = Setting()


def run_of(setting: Setting = DENSE, seed: int = 1, lr: str = "1") -> Run:
    return Run("small", setting, seed, ("--lr", lr, "--seed", str(seed), *setting.flags), 10, SHAPE)


def progress_line(iteration: int, loss: float, ms: float) -> str:
    """As Megatron prints it, behind what srun and torchrun put before it."""
    return (
        f"0: [default1]: [2026-01-01 00:00:00] iteration {iteration:8d}/      10 | consumed samples: 8 | "
        f"elapsed time per iteration (ms): {ms:.1f} | learning rate: 1.0E-03 | lm loss: {loss:.6E} | loss scale: 1.0"
    )


HEAD = ["$ bash launch/local.sh", "using world size: 2, data-parallel size: 2", "sla-megatron: off; parameters 1234"]
END = [
    "validation loss at iteration 10 | lm loss value: 9.0E+00 | lm loss PPL: 1.0E+00 | ",
    "validation loss at iteration 10 on validation set | lm loss value: 2.500000E+00 | lm loss PPL: 1.218249E+01 | ",
    "validation loss at iteration 10 on test set | lm loss value: 8.0E+00 | lm loss PPL: 1.0E+00 | ",
]
#: Iteration -> loss; its time is 100 ms, that of a launch's first one 1100.
TRUE = {i: 5 - 0.25 * i for i in range(1, 11)}


def launch(first: int, last: int) -> list[str]:
    """What Megatron prints: the second line of a launch is the mean with the first."""
    lines = []
    for i in range(first, last + 1):
        mean = (TRUE[first] + TRUE[i]) / 2 if i == first + 1 else TRUE[i]
        lines.append(progress_line(i, mean, {first: 1100, first + 1: 600}.get(i, 100)))
    return lines


def test_a_log() -> None:
    log = read_log([*HEAD, *launch(1, 10), *END])
    assert (log.parameters, log.processes, log.on_cpu, log.validation) == (1234, 2, False, {10: 2.5})
    assert {step.last: step.loss for step in log.steps} == pytest.approx(TRUE)
    assert log.training_loss(1) == pytest.approx(sum(TRUE.values()) / 10)
    assert log.seconds_per_iteration() == pytest.approx(0.1)
    assert log.seconds() == pytest.approx(1.1 + 9 * 0.1)
    assert log.missing(10) is None


def test_a_log_of_two_launches_is_that_of_one() -> None:
    """Killed at 7, gone on from the checkpoint of 4; and begun anew."""
    whole = read_log([*HEAD, *launch(1, 10), *END])
    continued = read_log([*HEAD, *launch(1, 7), *HEAD, *launch(5, 10), *END])
    assert continued.training_loss(1) == pytest.approx(whole.training_loss(1))
    assert [step.last for step in continued.steps] == list(range(1, 11))
    assert continued.seconds() == pytest.approx(1.1 + 0.3 + 1.1 + 0.5)
    anew = read_log([*HEAD, *launch(1, 7), *HEAD, *launch(1, 10), *END])
    assert anew.steps == whole.steps


def test_lines_of_several_iterations() -> None:
    """The first line is iteration 1 alone, then the means of 1-4, 5-8, 9-10: weights are iterations."""
    means = [(1, TRUE[1]), (4, sum(TRUE[i] for i in range(1, 5)) / 4), (8, sum(TRUE[i] for i in range(5, 9)) / 4)]
    log = read_log([*HEAD, *(progress_line(i, loss, 100) for i, loss in means)])
    assert [(step.first, step.last) for step in log.steps] == [(1, 1), (2, 4), (5, 8)]
    assert log.steps[1].loss == pytest.approx((TRUE[2] + TRUE[3] + TRUE[4]) / 3, abs=1e-5)
    # Ten lines of 4 are more than there is: all 8 iterations.
    assert log.training_loss(4) == pytest.approx(sum(TRUE[i] for i in range(1, 9)) / 8, abs=1e-5)
    # No line is of iteration 10, and the evaluation after it is the end.
    assert log.missing(10) == "it ends at iteration 8 of 10"
    lines = [*HEAD, *(progress_line(i, loss, 100) for i, loss in means), *END]
    assert read_log(lines).missing(10) is None


@pytest.mark.parametrize(
    ("lines", "missing"),
    [
        ([], "it says no number of parameters"),
        ([*HEAD, *launch(1, 9)], "it ends at iteration 9 of 10"),
        ([*HEAD, *launch(1, 10), END[0], END[2]], "it has no validation loss at the end"),
        ([*HEAD, *launch(1, 10), END[1].replace("2.500000E+00", "nan")], "its loss is not a number"),
    ],
)
def test_a_log_that_is_not_a_finished_runs(lines: list[str], missing: str) -> None:
    assert read_log(lines).missing(10) == missing


def row(distances: Sequence[int], groups: int, seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    setting = Setting(tuple(distances), groups)
    return {
        "name": f"small-c16-{setting.name}-s{seed}",
        "size": "small",
        "context": 16,
        "distances": list(distances),
        "skip_groups": groups,
        "kv_projection": "full",
        "layers": None,
        "seed": seed,
        "num_layers": 8,
        "num_heads": 8,
        "num_groups": 4,
        "tokens": 320,
        "parameters": 1234,
        "training_loss": loss + 1,
        "validation_loss": loss,
        "perplexity": 10 * loss,
        "tokens_per_second": 100.0 * seed,
        "processes": 2,
        "device": "cpu",
    } | changes


ROWS = [
    row([], 0, 1, 3.0),
    row([], 0, 2, 3.2),
    row([], 0, 3, 3.7),
    row([6], 2, 1, 2.9),
    row([6], 2, 2, 3.4),
    # No dense run of this seed.
    row([6], 2, 4, 9.0),
    row([2], 2, 1, 2.8),
    row([2, 6], 4, 1, 2.7),
    row([6], 2, 1, 2.95, kv_projection="pruned", layers="7-8"),
]


def test_statistics_by_hand() -> None:
    found = groups(ROWS)
    assert [(g.distance, g.skip_groups, g.variant, g.seeds) for g in found] == [
        ("", 0, "", (1, 2, 3)),
        ("2", 2, "", (1,)),
        ("2+6", 4, "", (1,)),
        ("6", 2, "", (1, 2, 4)),
        ("6", 2, "layers 7-8, pruned", (1,)),
    ]
    dense, _, several, six, pruned = found
    # (3.0, 3.2, 3.7): mean 3.3, squared deviations 0.09 + 0.01 + 0.16 = 0.26, over n - 1 = 2.
    assert dense.validation_loss == Spread(3, pytest.approx(3.3), 3.0, 3.7, pytest.approx(0.13**0.5))
    assert dense.difference is None and dense.is_dense and dense.tokens_per_second == 200
    # Of seeds 1 and 2 alone: -0.1 and +0.2; of independent means it would be 5.1 - 3.3.
    assert six.difference.n == 2 and six.difference.mean == pytest.approx(0.05)
    assert six.difference.deviation == pytest.approx(0.045**0.5)
    assert (six.skip_heads, several.skip_heads) == (4, 8)
    assert pruned.difference.mean == pytest.approx(-0.05) and pruned.difference.deviation is None


def test_pairs_are_of_the_same_size_and_context() -> None:
    others = [row([], 0, 1, 3.0, size="large"), row([], 0, 1, 3.0, context=32)]
    assert next(g for g in groups([*others, row([6], 2, 1, 2.0)]) if g.distances).difference is None


def test_tables() -> None:
    text = as_text(groups(ROWS)).splitlines()
    assert re.split(r" {2,}", text[4].strip()) == [
        *("small", "16", "6", "4/8", "3", "5.1000 ± 3.3867 (2.9000-9.0000)", "+0.0500 ± 0.2121"),
        *("51.000", "6.1000", "200", "1,234"),
    ]
    markdown = as_markdown(groups(ROWS)).splitlines()
    assert markdown[1] == "| :-- | --: | --: | --: | :-- | --: | --: | --: | --: | --: | --: | --: |"
    assert markdown[3].startswith("| small | 16 | 2 | 4/8 |  | 1 | 2.8000 | -0.2000 |")


def test_plots(tmp_path: Path) -> None:
    """Two panels; the same bytes from the same rows, and others from other rows."""
    more = [*ROWS, row([], 0, 1, 2.0, context=32), row([2], 2, 1, 2.0, context=32)]
    first, again, other = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    for folder, rows in ((first, more), (again, more[::-1]), (other, [*more, row([4], 2, 1, 2.85)])):
        folder.mkdir()
        assert plot(groups(rows), folder) == [folder / name for name in NAMES]
    for name in NAMES:
        drawn = (first / name).read_bytes()
        assert drawn == (again / name).read_bytes() != (other / name).read_bytes()
        ElementTree.fromstring(drawn)
    assert sorted(path.name for path in first.iterdir()) == sorted(NAMES)
    assert plot(groups(ROWS[:3]), tmp_path / "none") == []


def test_what_a_picture_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    plot(groups(ROWS), tmp_path)
    by_distance, by_heads = (figure.axes[0] for figure in drawn)
    assert by_distance.get_legend_handles_labels()[1] == [
        *("dense", "4 of 8 heads", "8 of 8 heads, distances 2+6", "4 of 8 heads, layers 7-8, pruned"),
    ]
    dense, line, several, _ = (
        one for one in by_distance.lines if one.get_label() == "dense" or one.get_marker() in "oD"
    )
    assert list(dense.get_ydata()) == pytest.approx([3.3, 3.3])
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2, 6], [2.8, pytest.approx(5.1)])
    assert list(several.get_xdata()) == [4] and several.get_linestyle() == "None"
    assert by_heads.get_legend_handles_labels()[1] == [
        *("dense", "distance 2", "distance 2+6", "distance 6", "distance 6, layers 7-8, pruned")
    ]
    assert by_heads.lines[1].get_xdata().tolist() == [4]


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
        r" --time=1:00:00 -pgpu \S+/launch/sweep.sbatch '\S+ sweep/grids/\w{12}.yaml' --out '.* sweep' --device cpu$",
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
