"""What a chain of attempts adds to a run's flags, and what it leaves alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sla_megatron.commands.job.additions import additions
from sla_megatron.commands.job.chain import Chain
from sla_megatron.commands.job.flags import JobError

DATA = ["--data-path", "corpus"]
#: Without it each call looks for tensorboard, in a process of its own.
NO_EVENTS = ["--tensorboard-dir", "events"]


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "SLURM_JOB_NAME"]:
        monkeypatch.delenv(name)
    yield


def everything(flag: str) -> bool:
    return True


@pytest.mark.parametrize(
    ("flags", "added"),
    [
        (DATA, {"--tensorboard-dir": "tensorboard", "--data-cache-path": "data-cache"}),
        (["--per-split-data-args-path=x"], {"--tensorboard-dir": "tensorboard", "--data-cache-path": "data-cache"}),
        (["--mock-data"], {"--tensorboard-dir": "tensorboard"}),
        ([*DATA, "--tensorboard-dir", "mine", "--data-cache-path=mine"], {}),
        ([*DATA, "--dataloader-fast-cache-load", "--tensorboard-dir", "x"], {}),
        (
            ["--wandb-project", "p"],
            {"--wandb-save-dir": "", "--tensorboard-dir": "tensorboard"},
        ),
        (["--wandb-project", "", "--tensorboard-dir", "x"], {}),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_flags_where_the_user_has_none(flags: list[str], added: dict[str, str], tmp_path: Path) -> None:
    found = additions(tmp_path, flags, everything).flags
    assert dict(zip(found[::2], found[1::2], strict=True)) == {f: str(tmp_path / name) for f, name in added.items()}


def test_a_script_that_takes_none_gets_none(tmp_path: Path) -> None:
    """W&B's variables it gets: its own wandb.init reads them."""
    found = additions(tmp_path, [*DATA, "--wandb-project", "p"], lambda flag: False)
    assert found.flags == [] and found.environment["WANDB_DIR"] == str(tmp_path)


def test_without_tensorboard_no_flag_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the ranks' Python has none, nor where it does not fit what is there; Megatron would end then."""
    (tmp_path / "tensorboard").mkdir()
    for broken in ("raise ModuleNotFoundError(name='tensorboard')", "raise TypeError('Descriptors cannot be created')"):
        (tmp_path / "tensorboard" / "__init__.py").write_text(broken)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        assert additions(tmp_path, [], everything).flags == []
    monkeypatch.undo()
    assert additions(tmp_path, [], everything).flags == ["--tensorboard-dir", str(tmp_path / "tensorboard")]


def test_one_wandb_run_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once, beside the chain.json that is already there; another run's is another."""
    (tmp_path / "chain.json").write_text('{"attempts": []}')
    flags = ["--wandb-project", "p", *NO_EVENTS]
    first = additions(tmp_path, flags, everything).environment
    assert first == {"WANDB_RUN_ID": first["WANDB_RUN_ID"], "WANDB_RESUME": "allow", "WANDB_DIR": str(tmp_path)}
    assert additions(tmp_path, flags, everything).environment == first
    assert Chain.read(tmp_path).attempts == []
    (tmp_path / "other").mkdir()
    assert additions(tmp_path / "other", flags, everything).environment["WANDB_RUN_ID"] != first["WANDB_RUN_ID"]
    # A command that is only shown leaves nothing behind.
    assert additions(tmp_path / "none", flags, everything).environment["WANDB_RUN_ID"]
    assert not (tmp_path / "none").exists()
    # Without a tracker, nothing.
    assert additions(tmp_path, [*DATA, *NO_EVENTS], everything).environment == {}
    # As a script of one's own is told of the project.
    monkeypatch.setenv("WANDB_PROJECT", "p")
    assert additions(tmp_path, NO_EVENTS, everything).environment == first


def test_a_resumed_run_keeps_its_jobs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron puts it into the run's configuration, where W&B takes no second value: another name ends the trainer."""
    flags = ["--wandb-project", "p", *NO_EVENTS]
    # A command that is shown where there is no job.
    additions(tmp_path, flags, everything)
    monkeypatch.setenv("SLURM_JOB_NAME", "first")
    assert additions(tmp_path, flags, everything).environment["SLURM_JOB_NAME"] == "first"
    monkeypatch.setenv("SLURM_JOB_NAME", "second")
    assert additions(tmp_path, flags, everything).environment["SLURM_JOB_NAME"] == "first"
    # A run that began elsewhere has what it had there.
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert "SLURM_JOB_NAME" not in additions(tmp_path, flags, everything).environment


@pytest.mark.parametrize("text", ["", "{}", '{"run_id": 5}', "[]"])
def test_a_kept_name_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    """Not a new run in silence."""
    (tmp_path / "wandb.json").write_text(text)
    with pytest.raises(JobError, match=r"wandb.json cannot be read .*: expected it as it was, or moved away"):
        additions(tmp_path, ["--wandb-project", "p", *NO_EVENTS], everything)


@pytest.mark.parametrize(
    ("own", "added"),
    [
        ({"WANDB_RUN_ID": "mine"}, {"WANDB_RESUME", "WANDB_DIR"}),
        ({"WANDB_RESUME": "must", "WANDB_DIR": "/mine"}, {"WANDB_RUN_ID"}),
        ({"WANDB_RESUME": "never"}, set()),
    ],
    # Not of a set, whose order is chance.
    ids=["run-id", "resume-and-folder", "never"],
)
def test_what_the_user_has_set_counts(
    own: dict[str, str], added: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    found = additions(tmp_path, ["--wandb-project", "p", *NO_EVENTS], everything)
    assert found.environment.keys() == added
    assert found.flags == (["--wandb-save-dir", own.get("WANDB_DIR", str(tmp_path))] if added else [])
