"""sla-job attend: what it finds in new checkpoints, what it removes, and what the next attempt makes of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sla_megatron.commands.job import cli
from sla_megatron.commands.job.attendance import RESUMED_FROM_DAMAGE, SAVE_AND_EXIT, Attendance
from sla_megatron.commands.job.chain import REQUEUE, STAY, STOP
from sla_megatron.commands.job.flags import TrainingFlags, training_flags
from sla_megatron.commands.job.keep import Keep
from sla_megatron.common.checkpoint_folders import TRACKER, tracked
from sla_megatron.common.errors import StartError
from tests.support.chain_runs import Run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_a_damaged_checkpoint_is_said_and_the_next_attempt_goes_back(run: Run) -> None:
    run.begin()
    run.save(10, 20, 30)
    run.flip(30)
    assert run.attend() == 0
    damage = "__0_0.distcp: weight: its bytes are not those that were written (CRC-32)"
    assert run.said[0] == f"{run.path(30)} is damaged: {damage}; the next attempt will go on from one that is not"
    assert [line.split()[0] for line in run.said[1:]] == ["iter_0000020", "iter_0000010"]
    assert run.looks() == {"10": None, "20": None, "30": damage}
    # A training may still use it.
    assert run.there() == ["10", "20", "30"] and tracked(run.checkpoints) == 30
    assert run.end() == STAY and "iteration 20 is saved" in run.said[0]
    assert run.begin() == REQUEUE
    assert run.there() == ["10", "20", "damaged_iter_0000030"] and tracked(run.checkpoints) == 20
    assert any(
        re.match(rf"{run.path(30)} is damaged: {re.escape(damage)}; it is now damaged_iter", s) for s in run.said
    )
    assert "resuming from iteration 20" in run.said
    # Saved anew, it is another one.
    run.save(30)
    run.attend()
    run.end()
    assert run.begin() == REQUEUE and "resuming from iteration 30" in run.said


def test_weights_that_are_not_finite(run: Run) -> None:
    """Training goes on; an attempt that saves nothing else has failed, and the chain does not go on for ever."""
    run.save(10)
    for attempt in range(1, 4):
        assert run.begin() == REQUEUE and "resuming from iteration 10" in run.said
        run.save(20, value=float("nan"))
        assert run.attend() == 0
        assert "400 of 400 values are not finite" in next(line for line in run.said if "damaged" in line)
        assert "it was written so, and what this training saves after it will probably be no better" in run.said
        assert run.end() == {1: STAY, 2: REQUEUE, 3: STOP}[attempt]
        assert "iteration 10 is saved, no more than it began with" in run.said[0]
    assert run.begin() == STOP


def test_an_attempt_that_resumed_from_a_damaged_one_ends(run: Run) -> None:
    """It was not looked into before; what the attempt has saved since is of no use either."""
    run.save(10, 20)
    run.begin()
    run.flip(20)
    run.save(30)
    assert run.attend() == RESUMED_FROM_DAMAGE == 21
    assert run.said[-1] == "this attempt resumed from it: what it has trained since is of no use"
    assert run.end() == STAY and "iteration 10 is saved, no more than it began with" in run.said[0]
    assert run.begin() == REQUEUE and "resuming from iteration 10" in run.said
    assert run.there() == ["10", "damaged_iter_0000020", "damaged_iter_0000030"]
    assert any("iter_0000030 is damaged: it was trained from iter_0000020" in line for line in run.said)


def test_what_is_damaged_after_it_was_loaded_spoils_nothing(run: Run) -> None:
    run.save(10)
    run.begin()
    run.attend()
    run.save(20)
    run.flip(10)
    assert run.attend() == 0 and run.looks().pop("20") is None and run.looks()["10"]
    run.end()
    assert run.begin() == REQUEUE and "resuming from iteration 20" in run.said
    assert run.there() == ["20", "damaged_iter_0000010"]


def test_nothing_is_begun_where_all_are_damaged(run: Run) -> None:
    run.save(10)
    run.begin()
    run.flip(10)
    run.attend()
    run.end()
    with pytest.raises(StartError, match=r"no complete one now \(iter_0000010: __0_0.distcp: weight: its bytes"):
        run.begin()
    assert run.there() == ["10"]


def test_a_file_that_is_as_it_was_is_looked_into_once(run: Run) -> None:
    run.save(10, 20)
    run.begin()
    run.attend()
    # What was resumed from is whole: older ones are for nothing.
    # Some of it are the names of its files.
    assert len(run.said) == 1 and re.match(r"iter_0000020 is whole and finite: 4\.\d\d kB in ", run.said[0])
    run.attend()
    assert run.said == []
    (run.path(20) / ".metadata").touch()
    run.attend()
    assert len(run.said) == 1
    # One that cannot be read is none.
    (run.folder / "checked.json").write_text('{"checkpoints": {"iter_0000020": {}}}')
    run.attend()
    assert len(run.said) == 1 and run.looks() == {"20": None}


def test_what_cannot_be_remembered_is_said_and_not_read_again(run: Run) -> None:
    """As on a full disk; the attendance goes on."""
    run.begin()
    run.save(10, 20)
    (run.folder / "checked.json").mkdir()
    rounds = iter([False, False, True])
    assert run.attend(wait=lambda: next(rounds)) == 0
    assert [line.rpartition(" ")[0] for line in run.said if "not remembered" in line] == [
        f"{run.folder}/checked.json: Is a directory: what is found in iter_{iteration:07d} is not"
        for iteration in (20, 10)
    ]
    assert sum("whole and finite" in line for line in run.said) == 2


def test_a_checkpoint_that_is_being_written_is_left_alone(run: Run) -> None:
    """Complete but for the tracker, as with --async-save on its way; then it is looked into."""
    run.save(10)
    run.begin()
    run.save(20, track=False)
    run.attend()
    assert run.looks() == {"10": None}
    steps = iter([lambda: (run.checkpoints / TRACKER).write_text("20") and False, lambda: True])
    run.attend(wait=lambda: next(steps)())
    assert run.looks() == {"10": None, "20": None}


def test_sizes_alone(run: Run) -> None:
    """``CHECK=sizes``: nothing is read, and KEEP holds all the same."""
    run.begin()
    run.save(10, 20, 30)
    run.flip(30)
    assert run.attend(keep="2", contents=False) == 0
    assert not (run.folder / "checked.json").exists() and run.there() == ["20", "30"]


@pytest.mark.parametrize(
    ("keep", "stays"),
    [
        ("1", [90]),
        ("3", [70, 80, 90]),
        ("2,every=40", [40, 80, 90]),
        ("2,40", [40, 80, 90]),
        ("20", [10, 20, 30, 40, 50, 60, 70, 80, 90]),
    ],
)
def test_which_stay(keep: str, stays: list[int], run: Run) -> None:
    run.begin()
    run.save(*range(10, 100, 10))
    run.attend(keep)
    assert run.there() == [str(iteration) for iteration in stays]
    removed = [line for line in run.said if "removed" in line]
    assert len(removed) == 9 - len(stays) and all(line.endswith(f"KEEP={Keep.read(keep)}") for line in removed)


def test_what_is_never_removed(run: Run) -> None:
    """Others' checkpoints, broken and damaged ones, links, and the newest that was found whole."""
    run.save(10, 20)
    run.begin()
    run.save(30, 40, 50, 60, 70)
    (run.path(30) / "metadata.json").unlink()
    shutil.move(run.path(40), run.folder / "elsewhere")
    run.path(40).symlink_to(run.folder / "elsewhere")
    run.flip(60)
    run.flip(70)
    kept = run.checkpoints / "removing_iter_0000005"
    kept.mkdir()
    run.attend("1")
    # 10 and 20 were there before the chain, 60 and 70 are damaged: 50 is the one that is left.
    assert run.there() == ["10", "20", "30", "40", "50", "60", "70", kept.name]
    run.save(80)
    run.attend("1")
    assert run.there() == ["10", "20", "30", "40", "60", "70", "80", kept.name]


def test_nothing_is_removed_before_newer_ones_were_looked_into(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.begin()
    run.save(10, 20)
    run.attend("1")
    assert run.there() == ["20"]
    run.save(30, 40)
    monkeypatch.setattr(Attendance, "_next", lambda *_: None)
    run.attend("1")
    assert run.there() == ["20", "30", "40"]


def test_a_removal_that_is_cut_off(run: Run) -> None:
    """It never looks like a checkpoint, and the next attempt goes on with it."""
    run.begin()
    run.save(10, 20)
    half = run.path(10).rename(run.checkpoints / "removing_iter_0000010_20260101T000000_7")
    (half / "metadata.json").unlink()
    run.attend()
    assert run.there() == ["20", "removing_iter_0000010"]
    run.attend("3")
    assert run.there() == ["20"]


@pytest.mark.parametrize(
    ("keep", "flags", "says"),
    [
        ("0", "", "--keep 0: expected how many of the newest checkpoints stay, such as 3, or 3,every=10000"),
        ("", "", "--keep without a value: expected how many"),
        ("x", "", "--keep x: expected how many"),
        ("3,every=0", "", "--keep 3,every=0: expected how many"),
        ("-1", "", "--keep -1: expected how many"),
        ("3,every=25", "--save-interval 10", "--keep 3,every=25: expected every= a multiple of --save-interval 10"),
        ("3", "--save-retain-interval 20", "--keep 3: expected no --save-retain-interval 20 beside it"),
    ],
)
@pytest.mark.parametrize("command", ["check", "attend"])
def test_rules_that_are_none(
    command: str, keep: str, flags: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--run", str(tmp_path / "run"), f"--keep={keep}", "--", *BOTH, *flags.split()])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"sla-job: error: {says}")
    assert not (tmp_path / "run").exists()


BOTH = ["--save", "a", "--load", "a"]


def test_rules_of_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script's overrides reach ``check`` without being repeated."""
    for name, value, says in (("KEEP", "none", "--keep none: expected how many"), ("CHECK", "all", "--check all: exp")):
        with monkeypatch.context() as set_here, pytest.raises(SystemExit) as ended:
            set_here.setenv(name, value)
            cli.main(["check", "--run", str(tmp_path), "--", *BOTH])
        assert ended.value.code == 2 and says in capsys.readouterr().err


def test_the_space_that_checkpoints_will_take(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 KiB each, counted by hand; nothing is said where there is room."""
    run.begin()
    run.save(10, 20)
    each = sum(path.stat().st_size for path in run.path(20).iterdir())
    usage = type(shutil.disk_usage("/"))
    # Without KEEP ten until iteration 100, eight of them new; with it the newest 2, 50, and one that is being written;
    # with Megatron's own rule, the newest, 30, 60, 90, and one that is being written.
    retained = run.flags, replace(run.flags, save_retain_interval=30)
    for flags, keep, new, says in (
        (0, None, 8, "10 checkpoints until iteration 100, without KEEP"),
        (
            1,
            None,
            3,
            "5 checkpoints with --save-retain-interval 30 (1 newest, 1 being written, 3 of every 30th iteration)",
        ),
        (
            0,
            "2,every=50",
            2,
            "4 checkpoints with KEEP=2,every=50 (2 newest, 1 being written, 1 of every 50th iteration)",
        ),
    ):
        run.flags = retained[flags]
        monkeypatch.setattr(shutil, "disk_usage", lambda path, new=new: usage(0, 0, each * new - 1))
        run.attend(keep)
        warned = [line for line in run.said if line.startswith("warning")]
        assert len(warned) == 1 and f"{run.checkpoints} will be full: {says}, {each / 1e3:.3g} kB each" in warned[0]
        monkeypatch.setattr(shutil, "disk_usage", lambda path, new=new: usage(0, 0, each * new))
        run.attend(keep)
        assert not [line for line in run.said if line.startswith("warning")]


def test_files_of_people(run: Run) -> None:
    run.begin()
    (run.folder / "save").touch()
    # Our trainer sees to it itself.
    assert run.attend() == 0 and (run.folder / "save").exists()
    assert run.attend(own_script=True) == SAVE_AND_EXIT == 20 and not (run.folder / "save").exists()
    assert run.attend(own_script=True) == 0
    # One that cannot be renamed would end each attempt.
    (run.folder / "save").touch()
    (run.folder / "save_taken").unlink()
    (run.folder / "save_taken").mkdir()
    assert run.attend(own_script=True) == 0 and "cannot be renamed (Is a directory)" in run.said[0]
    (run.folder / "stop").touch()
    assert run.attend() == SAVE_AND_EXIT and (run.folder / "stop").exists()


def test_the_command_beside_a_training(tmp_path: Path) -> None:
    """Started, it waits; SIGTERM ends it well, with all looked into and old ones removed; it outlives no launcher."""
    runs = [Run(tmp_path / name) for name in ("ended", "launcher killed")]
    started = []
    for run, launcher in zip(runs, ([], [sys.executable, "-c", LAUNCHER]), strict=True):
        run.begin()
        words = [sys.executable, "-m", "sla_megatron.commands.job.cli", "attend", "--run", run.folder]
        words += ["--keep", "1", "--", "--save", run.checkpoints, "--load", run.checkpoints]
        started.append(subprocess.Popen([*launcher, *words], stdout=subprocess.PIPE, text=True))
        run.save(10)
    for process in started:
        said = process.stdout.readline()
        assert said.startswith("sla-job: iter_0000010 is whole and finite"), said
    runs[0].save(20)
    started[0].send_signal(signal.SIGTERM)
    said, _ = started[0].communicate(timeout=30)
    assert started[0].returncode == 0 and "iter_0000020 is whole and finite" in said
    assert runs[0].there() == ["20"]
    started[1].kill()
    # Until nobody holds the other end.
    started[1].communicate(timeout=30)


LAUNCHER = "import subprocess, sys; subprocess.run(sys.argv[1:])"


def test_verify(run: Run, capsys: pytest.CaptureFixture) -> None:
    def verify(*words: str | Path) -> tuple[int, list[str], str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["verify", *map(str, words)])
        said = capsys.readouterr()
        return ended.value.code, said.out.splitlines(), said.err

    assert verify()[0] == 2
    assert verify("--run", run.folder)[2] == (
        f"sla-job: error: --run {run.folder}: expected checkpoints, iter_* folders, in {run.checkpoints}\n"
    )
    run.save(10, 20)
    status, lines, _ = verify("--save", run.checkpoints)
    assert status == 0 and [line.partition(" in ")[0].partition(", ")[0] for line in lines] == [
        f"{run.path(20)}: whole and finite",
        f"{run.path(10)}: whole and finite",
    ]
    assert not (run.folder / "checked.json").exists()
    run.flip(20)
    status, lines, _ = verify("--run", run.folder)
    assert status == 1 and "its bytes are not those that were written" in lines[0]
    # An attempt goes by it.
    run.begin()
    assert "resuming from iteration 10" in run.said
    status, lines, _ = verify("--save", run.path(10))
    assert status == 0 and len(lines) == 1


def test_flags_of_a_chain_of_before() -> None:
    assert training_flags(BOTH) == TrainingFlags(Path("a"), None)
    read = training_flags([*BOTH, "--save-interval", "5", "--save-retain-interval", "10"])
    assert (read.save_interval, read.save_retain_interval) == (5, 10)
    assert os.environ.get("KEEP") is None


def test_a_last_checkpoint_that_there_was_no_time_for(run: Run, capsys: pytest.CaptureFixture) -> None:
    run.begin()
    run.save(10)
    run.attend()
    run.save(100)
    words = ["--status", "0", "--", "--save", run.checkpoints, "--load", run.checkpoints, "--train-iters", "100"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["end", "--run", str(run.folder), *map(str, words)])
    assert ended.value.code == 0
    assert f"there was no time to look into {run.path(100)}: sla-job verify --run" in capsys.readouterr().out
