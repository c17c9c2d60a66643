"""sla-sweep trains: killed and gone on with, on this machine and as a Slurm job array, on the same batches."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import positions
from benchmarks import sweep as sweep_result
from sla_megatron.commands.sweep.cli import main
from sla_megatron.commands.sweep.training_log import LAUNCH_MARK
from tests.support.indexed_files import write_indexed
from tests.support.launch import ROOT, rank_environment
from tests.support.slurm import Cluster, cluster, missing, processes_with

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

DENSE, SLA = "tiny-c32-dense-s3", "tiny-c32-n4-k2-s3"
ITERATIONS, SAVE_INTERVAL = 60, 20

#: A distance of all four layers skips nothing: on the same batches its losses are those of the dense run.  128 words
#: need no padding, which exports leave out and training's softmax has.
GRID = f"""
flags:
  - --data-path {{data}} --split 80,20,0 --tokenizer-type NullTokenizer --vocab-size 128
  - --micro-batch-size 8 --global-batch-size 8 --lr 3e-3 --lr-warmup-iters 5
  - --log-interval 1 --eval-interval 1000 --eval-iters 2 --save-interval {SAVE_INTERVAL}
sizes: {{{{tiny: --num-layers 4 --hidden-size 64 --num-attention-heads 4}}}}
context: 32
tokens: {ITERATIONS * 8 * 32}
seeds: 3
sla: [{{{{distance: 4, skip-groups: 0.5}}}}]
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid's file, and a data set of its own."""
    folder = tmp_path_factory.mktemp("grid")
    write_indexed(folder / "data", documents=300, length=50, vocabulary=127)
    path = folder / "grid.yaml"
    path.write_text(GRID.format(data=folder / "data"))
    return path


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in rank_environment(0, 1, 0).items() if name not in ("RANK", "WORLD_SIZE")}
    return inherited | {"NPROC": "1", "PYTHON": sys.executable}


def sweep(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sla_megatron.commands.sweep.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def finished(grid: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a sweep that was killed in its second run and gone on with; what the last command printed."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    command = sweep("run", grid, "--out", out, "--device", "cpu")
    with (out.parent / "first.log").open("w") as log:
        first = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    tracker = out / "runs" / SLA / "checkpoints" / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 400
    while not tracker.exists():
        assert time.monotonic() < deadline and first.poll() is None, (out.parent / "first.log").read_text()
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (out / "runs" / SLA / "row.json").exists()
    row = (out / "runs" / DENSE / "row.json").stat()
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "runs" / DENSE / "row.json").stat() == row
    return out, done.stdout


def printed_losses(log: Path) -> dict[int, str]:
    """As they were printed; the second of a launch is left out, which is the mean with the first."""
    found = {}
    for launch in log.read_text().split(f"\n{LAUNCH_MARK}"):
        losses = re.findall(r"iteration +(\d+)/ *\d+ .*lm loss: (\S+)", launch)
        found |= {int(iteration): loss for iteration, loss in losses[:1] + losses[2:]}
    return found


def rows(out: Path) -> dict[str, dict]:
    return {row["name"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


def test_a_sweep_that_was_killed_goes_on(finished: tuple[Path, str], card: Callable) -> None:
    out, printed = finished
    assert "sla-sweep: 1 of 2 runs are finished, 1 to do" in printed
    assert re.search(rf"{SLA}: going on from iteration (20|40|60)\n", printed), printed
    texts = {name: (out / "runs" / name / "train.log").read_text() for name in (DENSE, SLA)}
    launches = [len(re.findall(r"^\$ bash ", text, flags=re.MULTILINE)) for text in texts.values()]
    assert launches == [1, 2]
    found = rows(out)
    assert found.keys() == texts.keys()
    for name, row in found.items():
        assert (row["tokens"], row["iterations"], row["processes"], row["device"]) == (15360, ITERATIONS, 1, "cpu")
        validation = re.findall(r"iteration 60 on validation set \| lm loss value: (\S+)", texts[name])[-1]
        assert row["validation_loss"] == float(validation) < 5.5
        last = [float(loss) for i, loss in printed_losses(out / "runs" / name / "train.log").items() if i > 50]
        assert len(last) in (9, 10) and row["training_loss"] == pytest.approx(sum(last) / len(last), abs=0.05)
        assert row["tokens_per_second"] > 0 and row["parameters"] > 100_000 and not (out / "data-cache").exists()
    assert sorted(p.name for p in (out / "runs" / DENSE).iterdir()) == [
        *("checkpoints", "lock", "row.json", "run.json", "train.log")
    ]
    results = {f"validation loss of {name}": row["validation_loss"] for name, row in found.items()}
    results["went on"] = re.search(rf"{SLA}: (going on from iteration \d+)\n", printed)[1]
    card("sweep", "sla-sweep run grid.yaml --out out --device cpu", results)


def test_dense_and_sla_see_the_same_batches(finished: tuple[Path, str]) -> None:
    """To all digits, through an interruption."""
    dense, sla = (printed_losses(finished[0] / "runs" / name / "train.log") for name in (DENSE, SLA))
    # No two batches have the same loss.
    assert len(set(dense.values())) == len(dense) == ITERATIONS - 1 and len(sla) >= ITERATIONS - 2
    assert {i: loss for i, loss in dense.items() if i in sla} == {i: loss for i, loss in sla.items() if i in dense}
    found = rows(finished[0])
    assert found[DENSE]["validation_loss"] == found[SLA]["validation_loss"]
    assert found[DENSE]["training_loss"] == pytest.approx(found[SLA]["training_loss"], abs=2e-6)


def test_equal_parameters(finished: tuple[Path, str], grid: Path, tmp_path: Path) -> None:
    """A short run of what SkipV1Former shares, counted by Megatron: as near to dense as the MLP's width allows."""
    text, entry = grid.read_text(), "source: 1, share: values, skip-groups: 0.5, kv-projection: pruned"
    text = text.replace("distance: 4, skip-groups: 0.5", f"name: ours, {entry}, parameters: dense")
    short = tmp_path / "short.yaml"
    short.write_text(text.replace(str(ITERATIONS * 8 * 32), str(8 * 8 * 32)) + "dense: false\n")
    command = sweep("run", short, "--out", tmp_path / "out", "--device", "cpu")
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = rows(tmp_path / "out").values()
    assert (row["sources"], row["share"], row["distances"], row["label"]) == ([1], "values", [], "ours")
    assert not {"sources", "share", "label", "ffn_hidden_size"} & rows(finished[0])[DENSE].keys()
    assert "share values" in (tmp_path / "out" / "runs" / row["name"] / "train.log").read_text()
    # Two values of 16 rows are left out of three layers: 3 * 2 * 16 * 65.  A unit of four MLPs has 4 * 129.
    dense = rows(finished[0])[DENSE]["parameters"]
    assert abs(row["parameters"] - dense) <= 4 * 129 / 2 < 3 * 2 * 16 * 65


def test_a_sweep_becomes_a_result(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its rows as they are, a table and two plots, for docs/results.md."""
    out = tmp_path / "sweep-here.json"
    monkeypatch.setattr(sys, "argv", ["sweep", str(finished[0]), "--out", str(out)])
    sweep_result.main()
    result = json.loads(out.read_text())
    losses = {row["name"]: row.pop("validation_losses") for row in result["rows"]}
    assert {row["name"]: row for row in result["rows"]} == rows(finished[0])
    assert all(losses[row["name"]][-1] == [row["tokens"], row["validation_loss"]] for row in result["rows"])
    assert (result["benchmark"], result["machine"]["device"]) == ("sweep", "cpu")
    assert [cells[2] for cells in sweep_result.tables(result)[0].rows] == ["dense", "4"]
    assert {path.name for path in tmp_path.iterdir()} == {out.name, "sweep-here.svg", "sweep-here-heads.svg"}
    monkeypatch.setattr(sys, "argv", ["sweep", str(tmp_path), "--out", str(tmp_path / "other.json")])
    with pytest.raises(SystemExit, match="2"):
        sweep_result.main()
    assert f"FOLDER {tmp_path}: expected a sweep's folder" in capsys.readouterr().err


def test_loss_by_position(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Exported, each run has on the samples of its last evaluation the loss that training printed.

    And a distance of all layers, the dense function, has dense's losses at every position.
    """
    out = tmp_path / "positions-here.json"
    monkeypatch.setattr(sys, "argv", ["positions", str(finished[0]), "--out", str(out)])
    positions.main()
    found = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(found) == {DENSE, SLA}
    for name, row in found.items():
        assert row["again"] == pytest.approx(
            rows(finished[0])[name]["validation_loss"], abs=positions.LARGEST_DIFFERENCE
        )
        assert [one[:2] for one in row["bins"]] == [[1, 16], [17, 32]]
    assert [one[2] for one in found[SLA]["bins"]] == pytest.approx([one[2] for one in found[DENSE]["bins"]], abs=1e-5)
    assert "Loss by position" in capsys.readouterr().out


def test_nothing_is_done_twice_or_mixed(
    finished: tuple[Path, str], grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = finished[0]
    main(["run", str(grid), "--out", str(out), "--device", "cpu"])
    assert "2 of 2 runs are finished, 0 to do" in capsys.readouterr().out
    main(["report", "--out", str(out), "--markdown"])
    assert "| tiny | 32 | 4 | 2/4 |  | 1 | " in capsys.readouterr().out
    assert {"loss-against-distance.svg", "loss-against-heads.svg"} < {path.name for path in out.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    other = tmp_path / "other.yaml"
    other.write_text(grid.read_text().replace("3e-3", "2e-3"))
    with pytest.raises(SystemExit) as error:
        main(["run", str(other), "--out", str(out), "--device", "cpu"])
    said = capsys.readouterr().err
    assert error.value.code == 2 and "was begun with other flags (--lr 3e-3, now --lr 2e-3)" in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # Its sockets are in there, whose names have a longest length.
    with cluster(tmp_path_factory.mktemp("slurm"), 2) as made:
        yield made


def in_cluster(slurm: Cluster, command: list[str]) -> str:
    """What one of our commands prints where Slurm's are those of ``slurm``."""
    settings = environment() | {name: slurm.environment[name] for name in ("PATH", "SLURM_CONF")}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(bool(missing()), reason="Slurm is not installed")
def test_a_job_array_finds_the_same(slurm: Cluster, finished: tuple[Path, str], grid: Path, tmp_path: Path) -> None:
    """Two tasks, on a node each, at the same time: the losses of the sweep on this machine.

    One of them, whose number is the array's own, is told to leave, and goes on; sbatch drops the environment.
    """
    out = tmp_path / "out"
    options = ["--", "--cpus-per-task=2", "--export=NONE"]
    command = sweep("submit", grid, "--out", out, "--limit", 2, "--device", "cpu", *options)
    submitted = in_cluster(slurm, command)
    job = re.search(r"Submitted batch job (\d+)", submitted)[1]
    task_log, deadline = out / "runs" / SLA / "train.log", time.monotonic() + 400
    while not (task_log.exists() and printed_losses(task_log)):
        assert time.monotonic() < deadline, task_log
        time.sleep(0.02)
    # It may not come to its end before the signal comes to it.
    own = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_CONF": slurm.environment["SLURM_CONF"]}
    ranks = processes_with(b"sla_megatron.pretrain_gpt", RANK="0", **own)
    assert ranks
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    slurm.command("scancel", "--batch", "--signal=USR1", f"{job}_1")
    while "slurm.sbatch: USR1 came: the ranks save and exit (step " not in task_log.read_text():
        assert time.monotonic() < deadline, task_log.read_text()[-4000:]
        time.sleep(0.02)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    assert slurm.job(f"{job}_1")["JobId"] == job
    # A job's state is known for minutes after its end.
    for task in ("0", "1"):
        known = slurm.until(f"{job}_{task}", {"COMPLETED", "FAILED", "CANCELLED"}, seconds=400)
        logs = [path.read_text() for path in (*out.glob("slurm/*.log"), *out.glob("runs/*/train.log"))]
        assert known["JobState"] == "COMPLETED", "\n".join(text[-4000:] for text in logs)
    ours, local = rows(out), rows(finished[0])
    assert ours.keys() == local.keys()
    for name, row in ours.items():
        same = ("validation_loss", "tokens", "parameters", "flags", "processes")
        assert {what: row[what] for what in same} == {what: local[name][what] for what in same}
        chain = json.loads((out / "runs" / name / "chain.json").read_text())["attempts"]
        assert [attempt["how"] for attempt in chain] == ["preempted", "finished"][name != SLA :]
        assert [attempt["job"] for attempt in chain] == [f"{job}_{int(name == SLA)}"] * len(chain)
        unprinted = {2, *(attempt["began_at"] + 2 for attempt in chain)}
        assert printed_losses(out / "runs" / name / "train.log").keys() == set(range(1, ITERATIONS + 1)) - unprinted
    assert "all 2 runs are finished" in in_cluster(slurm, command)
