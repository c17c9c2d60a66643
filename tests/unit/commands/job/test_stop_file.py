"""RUN/stop: an attempt that ends because of it is no failure, and nothing begins while it is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sla_megatron.commands.job import cli
from sla_megatron.commands.job.chain import Chain

from .test_job import checkpoint

# torch says that it saves from one process, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def job(run: Path, command: str, *options: str) -> int:
    """The exit status of ``sla-job COMMAND`` for a run of 10 iterations."""
    folder = str(run / "checkpoints")
    flags = ["--save", folder, "--load", folder, "--train-iters", "10"]
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--run", str(run), *options, "--", *flags])
    return ended.value.code


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("saved", "options", "status", "how", "failures"),
    [
        # torchrun's status after a signal is 1 whether ranks saved or not.
        pytest.param(4, ["--status", "1", "--signalled"], 0, "stopped", 0, id="saved"),
        pytest.param(0, ["--status", "1", "--signalled"], 0, "stopped", 0, id="before the first step"),
        pytest.param(4, ["--status", "0"], 0, "stopped", 0, id="exited by itself"),
        pytest.param(0, ["--status", "137"], 0, "status 137", 1, id="failed meanwhile"),
        pytest.param(10, ["--status", "0"], 0, "finished", 0, id="finished meanwhile"),
    ],
)
def test_an_attempt_that_somebody_stops(
    saved: int, options: list[str], status: int, how: str, failures: int, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """It does not go on; without the file the same end does (75, after a failure 76), unless training is finished."""
    run, control = tmp_path / "run", tmp_path / "control"
    for folder in (run, control):
        assert job(folder, "begin", "--job", "1") == 0
        if saved:
            checkpoint(folder / "checkpoints", saved)
    (run / "stop").touch()
    assert job(run, "end", *options) == status
    assert job(control, "end", *options) == {"finished": 0, "status 137": 76}.get(how, 75)
    chain = Chain.read(run)
    assert (chain.attempts[-1].how, chain.failures("1")) == (how, failures)
    assert (run / "stop").exists()
    assert (f"not going on: {run / 'stop'} (of " in capfd.readouterr().out) == (how != "finished")


def test_nothing_begins_while_the_file_is_there(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """One line that names the file and its owner, before anything is written; once it is removed the run goes on."""
    run = tmp_path / "run"
    assert job(run, "begin", "--job", "1") == 0
    checkpoint(run / "checkpoints", 4).rename(run / "checkpoints" / "iter_0000004")
    # Not of whoever runs the job, and of nobody that this machine knows.
    (run / "stop").touch()
    os.chown(run / "stop", 54321 if os.getuid() == 0 else -1, -1)
    before = files(run)
    for command, options in (("check", []), ("begin", ["--job", "2"])):
        assert job(run, command, *options) == 2
        said = capfd.readouterr().err.splitlines()[-1]
        owner = "user 54321" if os.getuid() == 0 else (run / "stop").owner()
        assert said.startswith(f"sla-job: error: {run / 'stop'} (of {owner}, since 20")
        assert said.endswith("expected it to be removed, if the run is to go on")
    assert files(run) == before
    (run / "stop").unlink()
    assert job(run, "begin", "--job", "2") == 0
    attempts = json.loads((run / "chain.json").read_text())["attempts"]
    assert [attempt["how"] for attempt in attempts] == ["without a word", None]
