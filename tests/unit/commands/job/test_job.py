"""sla-job: which checkpoints are complete, and what follows from the attempts of a run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from sla_megatron.commands.job import cli
from sla_megatron.commands.job.begin_command import LOOP, NOTHING_LEFT
from sla_megatron.commands.job.chain import FINISHED, REQUEUE, STOP, Chain, begin, end
from sla_megatron.commands.job.end_command import TRY_AGAIN
from sla_megatron.commands.job.flags import JobError, TrainingFlags, training_flags
from sla_megatron.common.checkpoint_folders import TRACKER, newest_complete, problem, tracked

# torch says that it saves from one process, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def checkpoint(folder: Path, iteration: int, track: bool = True) -> Path:
    """A checkpoint as torch writes it, with the file that Megatron adds."""
    path = folder / f"iter_{iteration:07d}"
    state = {"weight": torch.full((40, 10), float(iteration)), "steps": {"done": iteration}, "bias": torch.ones(7)}
    save(state, storage_writer=FileSystemWriter(path), no_dist=True)
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    if track:
        (folder / TRACKER).write_text(str(iteration))
    return path


def test_a_complete_checkpoint(tmp_path: Path) -> None:
    assert problem(checkpoint(tmp_path, 5)) is None
    assert newest_complete(tmp_path) == (5, {})


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "__0_0.distcp"])
@pytest.mark.parametrize("left", [None, 0, 0.5, 0.999])
def test_any_file_missing_or_cut_off(name: str, left: float | None, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5) / name
    content = path.read_bytes()
    if left is None:
        path.unlink()
    else:
        path.write_bytes(content[: min(int(len(content) * left), len(content) - 1)])
    reason = problem(path.parent)
    assert reason is not None and name in reason
    checkpoint(tmp_path, 3, track=False)
    assert newest_complete(tmp_path) == (3, {path.parent: reason})


def test_metadata_runs_no_code(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5)
    proof = tmp_path / "proof"
    (path / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch " + str(proof).encode() + b"'\ntR.")
    assert problem(path) is not None and not proof.exists()


#: What every chain has.
BOTH = ["--save", "a", "--load", "a"]


class Run:
    """A run of 10 iterations whose attempts a test plays."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, []
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(parents=True)

    def begin(self, job: str = "1", limit: int = 2) -> str:
        self.said.clear()
        flags = TrainingFlags(self.checkpoints, 10)
        return begin(Chain.read(self.folder), flags, job, "node[1-2]", limit, self.said.append)

    def end(self, status: int, signalled: bool = False, limit: int = 2) -> str:
        self.said.clear()
        flags = TrainingFlags(self.checkpoints, 10)
        return end(Chain.read(self.folder), flags, status, signalled, limit, self.said.append)

    def save(self, iteration: int) -> Path:
        return checkpoint(self.checkpoints, iteration)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_a_run_without_events(run: Run) -> None:
    assert run.begin() == REQUEUE and run.said[0] == "first start: no checkpoint yet"
    run.save(10)
    assert run.end(0) == FINISHED and run.said == ["attempt 1 finished: iteration 10 is saved"]
    assert run.begin() == FINISHED and "finished: iteration 10 of 10" in run.said


def test_preemptions_do_not_count_as_failures(run: Run) -> None:
    for attempt in range(1, 6):
        assert run.begin() == REQUEUE
        assert run.end(1, signalled=True) == REQUEUE
        assert run.said[0].startswith(f"attempt {attempt} ended by a signal: nothing is saved, no more than")


def test_failures_without_progress_end_the_chain(run: Run) -> None:
    assert (run.begin(), run.end(1)) == (REQUEUE, REQUEUE)
    run.begin()
    run.save(4)
    assert run.end(137) == REQUEUE
    assert run.said == ["attempt 2 failed with status 137: iteration 4 is saved, 4 iterations more than it began with"]
    assert (run.begin(), run.end(1)) == (REQUEUE, REQUEUE)
    # Megatron ends with status 0 after some errors.
    assert (run.begin(), run.end(0)) == (REQUEUE, STOP)
    assert run.said[1].startswith("stopping: 2 attempts in a row failed without a new checkpoint")
    assert run.begin() == STOP
    assert run.begin(job="2") == REQUEUE


def test_attempts_that_end_without_a_word_count_too(run: Run) -> None:
    assert run.begin() == REQUEUE
    assert run.begin() == REQUEUE
    assert run.said[0] == "attempt 1 ended without a word: its node failed, or the job was killed"
    assert run.begin() == STOP


def test_a_planned_exit_goes_on(run: Run) -> None:
    """As --exit-duration-in-mins: saved, status 0, not at the end."""
    run.begin()
    run.save(4)
    assert run.end(0) == REQUEUE and "ended by itself before the last iteration: iteration 4" in run.said[0]


def test_the_newest_complete_checkpoint_is_resumed(run: Run) -> None:
    run.begin()
    run.save(2)
    run.save(4)
    broken = run.save(6)
    (broken / ".metadata").unlink()
    run.end(1)
    assert run.begin() == REQUEUE
    assert tracked(run.checkpoints) == 4
    assert [line.partition(" is not complete")[0] for line in run.said if "not complete" in line] == [str(broken)]
    assert f"{run.checkpoints / TRACKER} said 6: it now says 4, the newest complete checkpoint" in run.said
    assert not broken.exists() and len(list(run.checkpoints.glob("incomplete_iter_0000006_*"))) == 1
    # A save that was finished but for the tracker counts.
    checkpoint(run.checkpoints, 8, track=False)
    run.begin()
    assert tracked(run.checkpoints) == 8


@pytest.mark.parametrize("text", [None, "", "4x", "99"])
def test_a_missing_or_broken_tracker_is_mended(text: str | None, run: Run) -> None:
    run.save(4)
    (run.checkpoints / TRACKER).unlink()
    if text is not None:
        (run.checkpoints / TRACKER).write_text(text)
    assert run.begin() == REQUEUE and tracked(run.checkpoints) == 4
    assert any("it now says 4" in line for line in run.said)


def test_lost_checkpoints_are_no_first_start(run: Run) -> None:
    run.begin()
    path = run.save(4)
    run.end(1)
    path.rename(run.folder / "elsewhere")
    for tracker in ("4", None):
        if tracker is None:
            (run.checkpoints / TRACKER).unlink()
        with pytest.raises(JobError, match="had a checkpoint of iteration 4 and has no complete one now"):
            run.begin()
    (run.folder / "elsewhere").rename(path)
    assert run.begin() == REQUEUE


def test_a_tracker_alone_is_no_first_start(run: Run) -> None:
    (run.checkpoints / TRACKER).write_text("broken")
    with pytest.raises(JobError, match="says 'broken': expected an iteration, or no file"):
        run.begin()


def test_the_first_save_was_cut_off(run: Run) -> None:
    run.begin()
    path = checkpoint(run.checkpoints, 2, track=False)
    (path / ".metadata").unlink()
    assert run.begin() == REQUEUE and "no checkpoint yet: starting from the beginning" in run.said
    assert path.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-iters", "3"], "--save: expected a folder"),
        (["--save", "a"], "--load None: expected the folder of --save, a"),
        (["--save", "a", "--load", "b"], "--load b: expected the folder of --save, a"),
        (["--save", "a", "--load", "a", "--finetune"], "--finetune would begin anew at each attempt"),
        (["--save", "a", "--load", "a", "--ckpt-format", "torch"], "--ckpt-format torch: expected torch_dist"),
        (["--save", "a", "--load", "a", "--train-iters", "x"], "argument --train-iters: invalid int value: 'x'"),
        ([*BOTH, "--ckpt-step", "500"], "--ckpt-step 500 would go back to that iteration at each attempt"),
        ([*BOTH, "--ckpt-step=500"], "--ckpt-step 500 would go back to that iteration at each attempt"),
        (
            [*BOTH, "--override-ckpt-iteration", "0"],
            "--override-ckpt-iteration 0 would count from that iteration again",
        ),
        ([*BOTH, "--no-load-optim"], "--no-load-optim would begin with a new optimizer at each attempt"),
        ([*BOTH, "--no-save-optim"], "--no-save-optim leaves each attempt to begin with a new optimizer"),
        ([*BOTH, "--no-load-rng"], "--no-load-rng would draw the same random numbers again"),
        ([*BOTH, "--no-save-rng"], "--no-save-rng leaves each attempt to draw the same random numbers again"),
        ([*BOTH, "--ckpt-convert-format", "torch"], "--ckpt-convert-format torch converts and ends"),
        ([*BOTH, "--moe-use-upcycling"], "--moe-use-upcycling makes a model anew of a dense one at each attempt"),
        ([*BOTH, "--exit-signal", "SIGINT"], "--exit-signal SIGINT: expected SIGTERM"),
    ],
)
def test_flags_that_a_chain_cannot_go_on_with(flags: list[str], message: str) -> None:
    with pytest.raises(JobError) as error:
        training_flags(flags)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("more", ["--ckpt-ste 5", "--exit-signal SIGTERM", "--ckpt-step 5 --skip-train", "--lr -1"])
def test_flags_that_a_chain_goes_on_with(more: str) -> None:
    """Megatron takes no abbreviations, and will say so; an evaluation may be of any checkpoint, time and again."""
    training_flags([*BOTH, *more.split()])


def test_a_first_start_without_the_checkpoint_that_must_be_there(run: Run) -> None:
    """Megatron would end with status 0, before it has trained."""
    flags = [*("--save", str(run.checkpoints), "--load", str(run.checkpoints)), "--exit-on-missing-checkpoint"]
    begun = (Chain(run.folder), "1", "node1", 2, run.said.append)
    with pytest.raises(JobError, match="--exit-on-missing-checkpoint: .* has no checkpoint, and the first attempt"):
        begin(begun[0], training_flags(flags), *begun[1:])
    assert not (run.folder / "chain.json").exists()
    assert begin(begun[0], training_flags([*flags, "--pretrained-checkpoint", "weights"]), *begun[1:]) == REQUEUE


def test_the_last_flag_of_a_name_counts() -> None:
    flags = ["--save", "a", "--load", "a", "--lr", "-1", "--save", "b", "--load=b", "--train-iters", "7"]
    assert training_flags(flags) == TrainingFlags(Path("b"), 7)


def test_statuses_of_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-2]")
    save_to = tmp_path / "checkpoints"
    flags = ["--run", str(tmp_path), "--max-failures", "1", "--"]
    flags += ["--save", str(save_to), "--load", str(save_to), "--train-iters", "5"]

    def status(*command: str) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
        return ended.value.code

    assert status("end", "--status", "0", *flags) == 2
    assert status("begin", *flags) == 0
    assert status("end", "--status", "1", "--signalled", *flags) == TRY_AGAIN == 75
    assert status("begin", *flags) == 0
    assert status("end", "--status", "1", *flags) == LOOP == status("begin", *flags) == 3
    checkpoint(save_to, 5)
    assert status("begin", *flags) == NOTHING_LEFT == 10
    assert status("show", "--run", str(tmp_path)) == 0
    shown = capsys.readouterr().out.splitlines()[-2:]
    assert shown[0].startswith("  1  job 8 on gpu[1-2]: ") and shown[0].endswith("at iteration 0, preempted")
    (tmp_path / "chain.json").write_text("{")
    assert status("begin", *flags) == 2
    assert "chain.json cannot be read" in capsys.readouterr().err


ATTEMPT = {"job": "1", "nodes": "n", "began": "then", "began_at": 0}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            "show --run nosuch",
            "--run nosuch: expected a run's folder, with the chain.json that its first attempt makes",
        ),
        ("show --run empty", "--run empty: expected a run's folder, with the chain.json"),
        ("show --run file", "--run file: expected a run's folder, with the chain.json"),
        ("show --run", "--run without a value: expected the run's folder"),
        ("show --run=", "--run without a value: expected the run's folder"),
        *[
            (f"show --run {name}", rf"{name}/chain.json cannot be read \(.*\): expected it as it was")
            for name in "abcdefg"
        ],
        ("end --run nosuch --status 1 -- {flags}", "nosuch: expected an attempt that has begun"),
        ("end --run file --status 1 -- {flags}", r"file/chain.json cannot be read \(.*\): expected it as it was"),
        ("end --run a --status 1 -- {flags}", r"a/chain.json cannot be read \(.*\): expected it as it was"),
        ("begin --run file -- {flags}", r"file/chain.json cannot be read \(.*\): expected it as it was"),
        ("begin --run a -- {flags}", r"a/chain.json cannot be read \(.*\): expected it as it was"),
        ("begin --run new -- --save file --load file", "file/latest_checkpointed_iteration.txt: Not a directory"),
        ("begin --run new --max-failures 0 -- {flags}", "--max-failures 0: expected an integer of 1 or more"),
        ("check --run file -- {flags}", "--run file: expected a folder, or none yet"),
        ("check --run new -- --save s --load t", "--load t: expected the folder of --save, s"),
        ("health --run new --gpus -1", "--gpus -1: expected an integer of 0 or more"),
    ],
)
def test_runs_that_are_none(
    command: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, status 2, and all files as they were."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("empty").mkdir()
    wrong = [ATTEMPT | {"began_at": "x"}], [ATTEMPT | {"more": 1}], [{}], None, {}
    broken = ["{", "[]", *(json.dumps({"attempts": attempts}) for attempts in wrong)]
    for name, text in zip("abcdefg", broken, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chain.json").write_text(text)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as ended:
        cli.main(command.format(flags="--save s --load s").split())
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert re.fullmatch(f"sla-job: error: {says}.*\n", said.err), said.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_every_command_and_option_has_a_help(capsys: pytest.CaptureFixture) -> None:
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main(["--help"])
        assert re.search(rf"^ +{command} +\S+", capsys.readouterr().out, re.MULTILINE)
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = capsys.readouterr().out.split("options:")[-1] + "\n"
        # argparse begins the next line where the option is a long one.
        options = re.findall(r"^  (?:-h, )?(--\w\S*)(?: \[?[A-Z]+\]?)?(?:  +|\n +)(\S.*)$", text, re.MULTILINE)
        assert "--run" in dict(options) and len(options) == len(re.findall(r"^  -", text, re.MULTILINE)), text


def test_health_of_a_node(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "gpu7")
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")

    def check(*flags: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["health", *flags])
        return ended.value.code, capsys.readouterr().err

    assert check("--run", str(tmp_path)) == (0, "")
    fake.write_text("#!/bin/sh\necho '0, 81559 MiB'\necho '1, 81559 MiB'\n")
    fake.chmod(0o755)
    assert check("--run", str(tmp_path), "--gpus", "2") == (0, "")
    status, text = check("--run", str(tmp_path), "--gpus", "8")
    assert (status, text) == (1, "sla-job: gpu7 is not healthy: 2 GPUs, 8 are needed\n")
    fake.write_text("#!/bin/sh\nexit 9\n")
    assert "gpu7 is not healthy: nvidia-smi: " in check("--run", str(tmp_path), "--gpus", "8")[1]
    assert "gpu7 is not healthy: " in check("--run", str(tmp_path / "gone"))[1]
    assert not list(tmp_path.glob(".probe*"))
