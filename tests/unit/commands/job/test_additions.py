"""What a chain of attempts adds to a run's flags, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sla_megatron.commands.job.additions import RUN_ID, additions
from sla_megatron.commands.job.chain import Chain

DATA = ["--data-path", "corpus"]


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
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
    flags = ["--wandb-project", "p"]
    first = additions(tmp_path, flags, everything).environment
    assert first == {"WANDB_RUN_ID": first["WANDB_RUN_ID"], "WANDB_RESUME": "allow", "WANDB_DIR": str(tmp_path)}
    assert additions(tmp_path, flags, everything).environment == first
    assert (tmp_path / RUN_ID).read_text().split() == [first["WANDB_RUN_ID"]]
    assert Chain.read(tmp_path).attempts == []
    (tmp_path / "other").mkdir()
    assert additions(tmp_path / "other", flags, everything).environment["WANDB_RUN_ID"] != first["WANDB_RUN_ID"]
    # A command that is only shown leaves nothing behind.
    assert additions(tmp_path / "none", flags, everything).environment["WANDB_RUN_ID"]
    assert not (tmp_path / "none").exists()
    # Without a tracker, nothing.
    assert additions(tmp_path, DATA, everything).environment == {}
    # As a script of one's own is told of the project.
    monkeypatch.setenv("WANDB_PROJECT", "p")
    assert additions(tmp_path, [], everything).environment == first


@pytest.mark.parametrize(
    ("own", "added"),
    [
        ({"WANDB_RUN_ID": "mine"}, {"WANDB_RESUME", "WANDB_DIR"}),
        ({"WANDB_RESUME": "must", "WANDB_DIR": "/mine"}, {"WANDB_RUN_ID"}),
        ({"WANDB_RESUME": "never"}, set()),
    ],
    ids=str,
)
def test_what_the_user_has_set_counts(
    own: dict[str, str], added: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    found = additions(tmp_path, ["--wandb-project", "p"], everything)
    assert found.environment.keys() == added
    folder = found.flags[found.flags.index("--wandb-save-dir") + 1]
    assert folder == own.get("WANDB_DIR", str(tmp_path))


#: As Megatron does it: _set_wandb_writer of megatron/training/global_vars.py, and training_log of training.py.
_ATTEMPT = """
import os, sys, wandb
folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
wandb.init(dir=folder, name="gpt", project="p", config={"first": first})
for iteration in range(first, last):
    wandb.log({"lm loss": float(iteration)}, iteration)
wandb.finish()
"""


def test_two_attempts_are_one_run_in_wandbs_own_files(tmp_path: Path) -> None:
    """Offline: a folder for each attempt, whose records carry one run's name; without the variables, two."""
    pytest.importorskip("wandb")
    added = additions(tmp_path, ["--wandb-project", "p"], everything)
    folder = added.flags[added.flags.index("--wandb-save-dir") + 1]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    plain |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    started = [
        subprocess.Popen([sys.executable, "-c", _ATTEMPT, to, *span], env=plain | more)
        for to, more in ((folder, added.environment), (str(tmp_path / "control"), {}))
        for span in (("1", "4"), ("3", "6"))
    ]
    assert [process.wait(120) for process in started] == [0] * 4
    ids, steps = recorded(tmp_path / "wandb")
    assert ids == [added.environment["WANDB_RUN_ID"]] * 2 and sorted(steps) == [[1, 2, 3], [3, 4, 5]]
    assert len(set(recorded(tmp_path / "control" / "wandb")[0])) == 2


def recorded(folder: Path) -> tuple[list[str], list[list[int]]]:
    """Of each run's file in ``folder``, as wandb itself reads it: the run's id, and the steps."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal import datastore

    ids, steps = [], []
    for path in folder.glob("*/run-*.wandb"):
        store = datastore.DataStore()
        store.open_for_scan(str(path))
        seen: list[int] = []
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                seen.append(record.history.step.num)
        steps.append(seen)
    return ids, steps
