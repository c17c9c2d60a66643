"""sla-job show: what it says of a run, by logs that a real run left (tests/data/disturbed_run).

The run: two pipeline ranks of the trainer, 400 iterations, saved every 5; the first attempt lost a rank to SIGKILL, the
second had flags that Megatron refuses, the third was sent SIGTERM, the fourth had --exit-interval, and in the fifth the
first rank was made to run out of memory.  Warnings, most arguments and most frames of tracebacks were left out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from sla_megatron.commands.job import cli
from sla_megatron.commands.job.progress.queue import QueuedJob, seconds
from sla_megatron.commands.job.progress.reasons import error_line
from sla_megatron.commands.job.progress.report import report
from sla_megatron.commands.job.progress.steps import first_step, last_step
from tests.support.launch import ROOT
from tests.unit.commands.job.test_job import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

REAL = ROOT / "tests" / "data" / "disturbed_run"


def no_slurm(job: str) -> None:
    """This machine's knows nothing of the job."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run, as it was when its last attempt had ended."""
    folder = tmp_path / "run"
    shutil.copytree(REAL, folder)
    return folder


def attempts(run: Path) -> list[dict]:
    return json.loads((run / "chain.json").read_text())["attempts"]


def change(run: Path, number: int, **changes: object) -> None:
    """Of one attempt."""
    all_of_them = attempts(run)
    all_of_them[number] |= changes
    (run / "chain.json").write_text(json.dumps({"attempts": all_of_them}))


def with_job_log(run: Path) -> None:
    """As ``begin`` notes it: the job's log, and how long it was."""
    log = run / "gpt-7.log"
    text = log.read_text()
    begun = [text.index(f"attempt {number} of this run") for number in (1, 2, 3, 4, 5)]
    for number, place in enumerate(begun):
        change(run, number, log=str(log), log_from=text.rindex("\n", 0, place) + 1)


def test_why_each_attempt_ended(run: Path) -> None:
    """The rank that failed first, in its own words; of one that was killed what torchrun says in the job's log."""
    with_job_log(run)
    shown = report(run, no_slurm)["attempts"]
    assert [(one["rank"], one["reason"]) for one in shown] == [
        ("rank 1 (local rank 1)", "Signal 9 (SIGKILL)"),
        (
            "local rank 0 on node1",
            "sla-megatron: error: Megatron does not accept these flags: "
            "Number of layers should be divisible by the pipeline-model-parallel size",
        ),
        (None, "Megatron: exiting program after receiving SIGTERM"),
        (None, "Megatron: exiting program at iteration 20"),
        ("rank 0 (local rank 0)", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
    ]


def test_a_node_that_only_missed_the_other(run: Path) -> None:
    """Its torchrun tells, before that of the killed rank's node, of a rank that says that a connection was closed."""
    log = run / "gpt-7.log"
    before, cause, after = log.read_text().partition("0: Root Cause (first observed failure):\n")
    told, line, rest = after.partition("0: ====")
    other = re.sub(
        r"(rank +:) 1 \(local_rank: 1\)", r"\1 0 (local_rank: 0)", re.sub("exitcode  : -9", "exitcode  : 1", told)
    )
    assert other.count("0 (local_rank: 0)") == other.count("exitcode  : 1") == 1
    log.write_text(before + cause + other + cause + told + line + rest)
    with_job_log(run)
    assert report(run, no_slurm)["attempts"][0]["reason"] == "Signal 9 (SIGKILL)"


def test_without_the_jobs_log(run: Path) -> None:
    """As in a container: the ranks' logs alone.  Of the one that was killed the other says that it misses it."""
    shown = report(run, no_slurm)["attempts"]
    assert shown[0]["rank"] == "local rank 1 on node1"
    assert shown[0]["reason"].startswith(
        "ended without a word: killed, or its node failed; others say: RuntimeError: ["
    )
    assert "Connection closed by peer" in shown[0]["reason"]
    assert shown[4]["rank"] == "rank 0" and shown[4]["reason"].startswith("torch.OutOfMemoryError: CUDA out of memory")


@pytest.mark.parametrize("launch", ["torchrun", "srun"])
def test_attempts_in_one_start_of_the_job(launch: str, run: Path) -> None:
    """They have one folder of logs, in which each launch has its own; which is whose, the time says."""
    shown = report(run, no_slurm)["attempts"]
    for number in range(3):
        change(run, number, restart=0)
        (node,) = (run / "logs" / f"7.{number}").iterdir()
        (made,) = node.iterdir()
        place = run / "logs" / "7.0" / node.name / {"torchrun": f"id{9 - number}", "srun": str(9 - number)}[launch]
        shutil.move(made if launch == "torchrun" else made / "attempt_0", place)
        for file in place.rglob("*.log"):
            # Those of silent ranks as the attempt begins, a second before the next one the others.
            seconds = datetime.fromisoformat(
                attempts(run)[number]["began" if "1" in file.parts else "ended"]
            ).timestamp()
            os.utime(file, (seconds, seconds))
    assert report(run, no_slurm)["attempts"] == shown


def test_a_chain_of_before(run: Path) -> None:
    """It does not say which start of the job an attempt was: the order does.  A node that was excluded left no logs."""
    shown = report(run, no_slurm)["attempts"]
    (run / "logs" / "7.4").rename(run / "logs" / "7.11")
    (run / "logs" / "7.4" / "sla_megatron.commands.doctor.cli-node1").mkdir(parents=True)
    for number in range(5):
        change(run, number, restart=None)
    assert report(run, no_slurm)["attempts"] == shown


def test_progress_of_each_attempt(run: Path) -> None:
    """First and last iteration, by the last rank's log; what was trained and not saved is lost."""
    shown = report(run, no_slurm)["attempts"]
    found = [(one["first_iteration"], one["last_iteration"], one["lost_iterations"]) for one in shown]
    assert found == [(1, 10, 5), (None, None, None), (6, 15, 0), (16, 20, 0), (21, 21, 1)]
    seconds_of = [(datetime.fromisoformat(a["ended"]) - datetime.fromisoformat(a["began"])).seconds for a in shown]
    assert [one["seconds"] for one in shown] == seconds_of


def test_how_the_run_is(run: Path) -> None:
    """Loss, tokens/s and time left, computed here from the lines themselves: 8 samples of 64 tokens an iteration."""
    (run / "chain.json").write_text(json.dumps({"attempts": attempts(run)[:4]}))
    (path,) = [path for path in (run / "logs" / "7.3").rglob("stdout.log") if "consumed samples" in path.read_text()]
    lines = [line for line in path.read_text().splitlines() if "consumed samples" in line]
    first, last = lines[0], lines[-1]
    times = [datetime.fromisoformat(line[2:28]) for line in (first, last)]
    milliseconds = float(last.partition("iteration (ms): ")[2].split()[0])
    shown = report(run, no_slurm)
    assert (shown["state"], shown["iteration"], shown["train_iters"], shown["read"]) == (
        "between attempts", 20, 400, "logs",
    )  # fmt: skip
    assert shown["loss"] == float(last.partition("lm loss: ")[2].split()[0])
    assert shown["tokens_per_second"]["now"] == pytest.approx(8 * 64 / (milliseconds / 1000))
    took = (times[1] - times[0]).total_seconds()
    assert len(lines) == 5 and shown["tokens_per_second"]["attempt"] == pytest.approx(4 * 8 * 64 / took)
    assert shown["seconds_left"] == {"training": pytest.approx(380 * took / 4), "job": None}
    assert shown["checkpoint"] is None and shown["slurm"] is None


def test_by_tensorboards_files(run: Path) -> None:
    """Where no log has iterations, as of a script that prints them otherwise; written as Megatron writes them."""
    change(run, 4, how=None, ended=None, ended_at=None)
    for path in (run / "logs" / "7.4").rglob("1/stdout.log"):
        path.unlink()
    with SummaryWriter(run / "tensorboard") as writer:
        for iteration in range(21, 2021):
            for tag, value in (("lm loss", 2000 - iteration), ("batch-size", 8), ("iteration-time", 0.5), ("other", 1)):
                writer.add_scalar(tag, value, iteration, walltime=1e9 + 2 * iteration)
                writer.add_scalar(f"{tag} vs samples", 0, 8 * iteration)
    shown = report(run, no_slurm)
    assert (shown["state"], shown["read"], shown["iteration"], shown["loss"]) == ("training", "tensorboard", 2020, -20)
    assert shown["tokens_per_second"] == {"now": 8 * 64 / 0.5, "attempt": 8 * 64 / 2}
    # Those of an attempt before, which this one has not followed yet.
    change(run, 4, began="2999-01-01T00:00:00+0000")
    assert (report(run, no_slurm)["state"], report(run, no_slurm)["loss"]) == ("starting", None)


RUNNING = QueuedJob("RUNNING", None, 600.0)


@pytest.mark.parametrize(
    ("last", "slurm", "state"),
    [
        ({"how": None, "ended": None, "ended_at": None}, None, "training"),
        ({"how": None, "ended": None, "ended_at": None}, RUNNING, "training"),
        ({"how": None, "ended": None, "ended_at": None, "restart": 8}, RUNNING, "starting"),
        ({"how": None, "ended": None, "ended_at": None}, QueuedJob("GONE"), "failed"),
        ({"how": None, "ended": None, "ended_at": None}, QueuedJob("PENDING", "Priority"), "waiting"),
        ({"how": "preempted"}, QueuedJob("PENDING", "BeginTime"), "waiting"),
        ({"how": "preempted"}, QueuedJob("COMPLETING"), "between attempts"),
        ({"how": "preempted"}, None, "between attempts"),
        ({"how": "preempted"}, QueuedJob("GONE"), "stopped"),
        ({"how": "stopped"}, None, "stopped"),
        ({"how": "status 1", "max_failures": 1}, None, "failed"),
        ({"how": "status 1", "max_failures": 2}, None, "between attempts"),
        ({"how": "status 1", "max_failures": 2}, QueuedJob("GONE"), "failed"),
        ({"how": "finished", "ended_at": 400}, QueuedJob("GONE"), "finished"),
    ],
)
def test_states(run: Path, last: dict, slurm: QueuedJob | None, state: str) -> None:
    """By the last attempt, the one before which failed too, and by what Slurm says."""
    change(run, 4, **last)
    shown = report(run, lambda job: slurm)
    assert shown["state"] == state
    assert shown["seconds_left"]["job"] == (slurm.seconds_left if slurm else None)


def test_checkpoints(run: Path) -> None:
    """The newest complete one, whether it was looked into, and one that is being written."""
    change(run, 4, how=None, ended=None, ended_at=None)
    folder = checkpoint(run / "checkpoints", 20)
    shown = report(run, no_slurm)
    assert (shown["checkpoint"]["iteration"], shown["checkpoint"]["checked"]) == (20, None)
    assert 0 <= shown["checkpoint"]["seconds_old"] < 100 and shown["saving"] is None
    looked = {"when": "2026-11-27T05:44:20+0000", "damage": None}
    (run / "checked.json").write_text(json.dumps({"checkpoints": {folder.name: looked | {"fingerprint": "x"}}}))
    (checkpoint(run / "checkpoints", 25) / ".metadata").unlink()
    shown = report(run, no_slurm)
    assert (shown["checkpoint"]["iteration"], shown["checkpoint"]["checked"], shown["saving"]) == (20, looked, 25)


def test_what_is_printed(run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines for people, one object for programs; --watch ends with the run."""
    with_job_log(run)
    checkpoint(run / "checkpoints", 20)
    change(run, 4, how="finished")
    # A Slurm of this machine may have a job of that number.
    monkeypatch.setenv("PATH", "")
    for options in ([], ["--watch", "0.01"], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["show", "--run", str(run), *options])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        if options == ["--json"]:
            assert json.loads(text).keys() == report(run, no_slurm).keys() and text.count("\n") == 1
            continue
        rows = dict(line.split(maxsplit=1) for line in text.splitlines()[:3])
        assert rows["state"] == "finished" and rows["iteration"].startswith("21 of 400 (5.2 %), logged ")
        assert "tokens/s    " in text and " of training" in text
        assert "checkpoint  iteration 20, " in text and "not looked into" in text
        assert "\n     rank 1 (local rank 1): Signal 9 (SIGKILL)\n" in text
        assert "\n     iterations 1 to 10 in 33 s, 5 of them lost\n" in text


@pytest.mark.parametrize("flag", ["--watch 0", "--watch -1", "--watch x"])
def test_bad_seconds(flag: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["show", "--run", str(run), *flag.split()])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"sla-job: error: {flag}: expected a number of seconds, more than 0\n"


ROW = " [{time:%Y-%m-%d %H:%M:%S.%f}] iteration {n:8d}/{last:8d} | consumed samples: {samples:12d} | elapsed time per "
ROW += "iteration (ms): {ms:.1f} | global batch size:     8 | lm loss: {loss:.6E} | loss scale: 1.0 |\n"


def test_a_long_run_is_read_in_no_time(tmp_path: Path) -> None:
    """100 attempts of 1000 iterations, 8 ranks each: both ends of each are found."""
    run, begin = tmp_path, datetime(2026, 1, 1)
    all_of_them = []
    for number in range(100):
        folder = run / "logs" / f"7.{number}" / "train-node1" / "7_x" / "attempt_0"
        for rank in range(8):
            (folder / str(rank)).mkdir(parents=True)
            (folder / str(rank) / "stderr.log").write_text("a warning\n" * 50)
            (folder / str(rank) / "stdout.log").write_text("INFO: something\n" * 50)
        rows = [
            ROW.format(time=begin + timedelta(seconds=n), n=n, last=100_000, samples=8 * n, ms=1000, loss=1 / n)
            for n in range(1000 * number + 10, 1000 * number + 1001, 10)
        ]
        (folder / "7" / "stdout.log").write_text("".join(rows))
        saved = 1000 * number + 900
        all_of_them.append({"job": "7", "nodes": "n", "began": "2026-01-01T00:00:00+0000", "began_at": saved - 900}
                           | {"ended": "2026-01-01T00:20:00+0000", "ended_at": saved, "how": "status 1"}
                           | {"restart": number})  # fmt: skip
    (run / "chain.json").write_text(json.dumps({"attempts": all_of_them}))
    before = time.process_time()
    shown = report(run, no_slurm)
    # The aim is a second; a shared machine may be slower.
    assert time.process_time() - before < 3
    assert (shown["iteration"], shown["train_iters"], shown["loss"]) == (100_000, 100_000, 1e-5)
    assert [(one["first_iteration"], one["last_iteration"], one["lost_iterations"]) for one in shown["attempts"]] == [
        (1000 * number + 10, 1000 * number + 1000, 100) for number in range(100)
    ]


@pytest.mark.parametrize("length", [0, 1, 3000, 300_000])
def test_lines_across_blocks(length: int, tmp_path: Path) -> None:
    """Whatever lies before, between and after the lines, and where a line is cut off."""
    lines = [ROW.format(time=datetime(2026, 1, 1), n=n, last=9, samples=n, ms=1, loss=n) for n in (1, 2, 3)]
    filler = "x" * length + "\n"
    log = tmp_path / "log"
    log.write_text(filler + filler.join(lines) + filler + lines[2][:40])
    assert (first_step(log).loss, last_step(log).loss) == (1, 3)
    log.write_text(filler)
    assert first_step(log) is last_step(log) is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Traceback (most recent call last):\n  File x\n    y\nValueError: z\nmore\n", "ValueError: z"),
        (
            "Traceback (most recent call last):\n  File x\nKeyError: 1\n\n"
            "During handling of the above exception, another exception occurred:\n\n"
            "Traceback (most recent call last):\n  File y\nOSError: 2\n",
            "OSError: 2",
        ),
        # A helper's, and that of the rank that waits for it.
        (
            "Traceback (most recent call last):\n  File x\nRuntimeError: \n   An attempt\n\n"
            "Traceback (most recent call last):\n  File y\nEOFError\n",
            "RuntimeError: An attempt",
        ),
        # What torch marks ends the rank, what was logged before did not.
        (
            "Traceback (most recent call last):\n  File x\nOSError: 1\n[rank3]: Traceback (most recent call last):\n"
            "[rank3]:   File y\n[rank3]: ValueError: 2\n",
            "ValueError: 2",
        ),
        ("Exception ignored in: <x>\nTraceback (most recent call last):\n  File x\nTypeError: 1\n", None),
        ("terminate called after throwing an instance of 'c10::Error'\n  what():  NCCL error\n", "what():  NCCL error"),
        ("Fatal Python error: Segmentation fault\n", "Fatal Python error: Segmentation fault"),
        ("sla-megatron: error: --sla-layers 9: expected\n", "sla-megatron: error: --sla-layers 9: expected"),
        ("a warning\n", None),
    ],
)
def test_the_error_in_a_log(text: str, line: str | None) -> None:
    found = error_line(text)
    assert (found and found[0]) == line


@pytest.mark.parametrize(
    ("text", "value"),
    [("1-02:03:04", 93784), ("02:03:04", 7384), ("3:04", 184), ("UNLIMITED", None), ("INVALID", None), ("", None)],
)
def test_slurms_times(text: str, value: float | None) -> None:
    """As squeue's manual describes %L."""
    assert seconds(text) == value
