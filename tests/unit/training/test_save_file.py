"""The save file on rank 0: how often it is looked for, when it gets its other name, and which."""

from __future__ import annotations

import inspect
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sla_megatron.training import save_file
from sla_megatron.training.save_file import SaveFile


def test_it_is_looked_for_once_a_second(tmp_path: Path) -> None:
    """A step may take some milliseconds, and the file system may be slow."""
    file, began = SaveFile(tmp_path / "save"), time.monotonic()
    assert file.said(0) == 0
    file.path.touch()
    answers = []
    while 2 not in answers:
        answers.append(file.said(0))
        assert time.monotonic() - began < 10
    assert time.monotonic() - began >= 1.0 and len(answers) > 100
    # Said once, until it is answered.
    assert file.said(0) == 0
    file.finished(40)
    assert [path.name for path in tmp_path.iterdir()] == ["saved_at_40"]


def test_the_signal_is_not_drowned(tmp_path: Path) -> None:
    """Where rank 0 has it and sees the file at once."""
    file = SaveFile(tmp_path / "save")
    file.path.touch()
    assert file.said(1) == 1 and file.waiting


def test_names_that_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fault the same iteration comes again; what somebody asked before stays as it is."""
    monkeypatch.setattr(save_file, "_SECONDS", 0.0)
    file = SaveFile(tmp_path / "save")
    for text in ("first", "second", "third"):
        file.path.write_text(text)
        assert file.said(0) == 2
        file.finished(40)
    names = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert names == {"saved_at_40": "first", "saved_at_40_2": "second", "saved_at_40_3": "third"}


def test_a_file_that_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Of somebody else's, in a folder that allows no more: it asks once, not at each step."""
    monkeypatch.setattr(save_file, "_SECONDS", 0.0)
    file = SaveFile(tmp_path / "save")
    file.path.touch()

    def refused(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        assert file.said(0) == 2
        file.finished(40)
        assert [file.said(0) for _ in range(3)] == [0, 0, 0]
    assert "it cannot be renamed (Operation not permitted), and is not heeded again" in capfd.readouterr().out
    time.sleep(0.01)
    file.path.touch()
    assert file.said(0) == 2


@pytest.fixture
def saving(megatron: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SaveFile]:
    """Rank 0 has seen the file, and Megatron is in the save of iteration 40, with a queue of its own."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.training import async_utils

    file = SaveFile(tmp_path / "save")
    file.path.touch()
    assert file.said(0) == 2
    monkeypatch.setattr(save_file, "_file", file)
    monkeypatch.setattr(async_utils, "_async_calls_queue", AsyncCallsQueue())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield file
    torch.distributed.destroy_process_group()


def test_an_asynchronous_save_is_finished_first(saving: SaveFile) -> None:
    """Through Megatron's own queue: the new name comes with the last callback, and with no earlier save's."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.training.async_utils import _get_async_calls_queue, schedule_async_save

    schedule = save_file._finished_later(schedule_async_save)
    found: list[list[str]] = []

    def look() -> None:
        found.append([path.name for path in saving.path.parent.iterdir()])

    # One that was under way already, and one that does not resume a run (non-persistent), then the one for the file.
    for iteration in (None, None, 40):
        saving.saving = iteration
        schedule(AsyncRequest(None, (), [look]))
        assert saving.path.exists()
    saving.saving = None
    _get_async_calls_queue().maybe_finalize_async_calls(blocking=True)
    assert found == [["save"]] * 3
    assert [path.name for path in saving.path.parent.iterdir()] == ["saved_at_40"]


@pytest.mark.parametrize(
    ("folder", "flags", "heeded", "missing"),
    [
        ("runs/gpt", {}, True, None),
        (None, {}, False, None),
        ("", {"save": None}, False, None),
        ("runs/gpt", {"save": None}, False, "--save"),
        ("runs/gpt", {"exit_signal_handler": False}, False, "--exit-signal-handler"),
        ("runs/gpt", {"exit_signal_handler": False, "rank": 1}, False, None),
    ],
)
def test_nothing_is_touched_unless_it_can_be_heeded(
    folder: str | None,
    flags: dict[str, object],
    heeded: bool,
    missing: str | None,
    megatron: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """Megatron's own functions are there in all other runs; a user who named the folder is told what lacks."""
    places = [wrapping.resolve() for wrapping in save_file.WRAPPINGS]
    for owner, name in places:
        # As in a process in which no run heeded one.
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    before = [getattr(owner, name) for owner, name in places]
    monkeypatch.setattr(save_file, "_file", None)
    monkeypatch.delenv(save_file.RUN_FOLDER, raising=False)
    if folder is not None:
        monkeypatch.setenv(save_file.RUN_FOLDER, folder)
    save_file.heed_save_file(Namespace(**{"save": "checkpoints", "exit_signal_handler": True, "rank": 0} | flags))
    changed = [getattr(owner, name) is not one for (owner, name), one in zip(places, before, strict=True)]
    assert changed == [heeded] * 4 and (save_file._file is not None) == heeded
    said = f"sla-megatron: runs/gpt/save is not heeded without {missing}\n" if missing else ""
    assert capfd.readouterr().out == said
