"""``touch RUN/save`` during a training: a checkpoint of that step, and nothing else is changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sla_megatron.common.checkpoint_folders import newest_complete, problem
from tests.support.runs import argv, figures, train_on_all_ranks

pytestmark = pytest.mark.distributed

INTERVAL, LAST = 3, 7
#: Where somebody asks: at a step of no save, at one where Megatron saves, and at the last, after which it does.
ASKED = (2, 3, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("save-file")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """TP=2, dropout on: its random state must come back as well."""

    def request(name: str, asked: tuple[int, ...] = (), flags: dict | None = None, **more: object) -> dict:
        run = folder / name
        run.mkdir()
        common = {"sla": True, "sla_skip_distance": 2, "train_iters": LAST, "eval_iters": 0, "save_interval": INTERVAL}
        common |= {"save": run / "checkpoints", "exit_signal_handler": True} | (flags or {})
        touched = {str(iteration): str(run / "save") for iteration in asked}
        return {"argv": argv(**common), "run_folder": str(run), "touched": touched} | more

    requests = {
        # Whoever does not start a chain may have such a file.
        "alone": request("alone", ASKED, run_folder=None),
        "asked": request("asked", ASKED),
        "resumed": request("resumed", flags={"load": folder / "asked" / "checkpoints", "ckpt_step": ASKED[0]}),
        "told to end": request("told to end", (5,), signalled=[1, 5]),
    }
    return train_on_all_ranks(requests, 2, folder / "ranks")


def saved(answer: dict[str, Any]) -> list[int]:
    """The iterations that Megatron said it saved, each as often as it did."""
    return [
        int(number) for number in re.findall(r"successfully saved checkpoint from iteration +(\d+)", answer["stdout"])
    ]


def test_a_checkpoint_more_and_no_other_training(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """None twice where Megatron saves itself; losses and norms are those of the run that heeds no file, bit for bit."""
    assert saved(runs["alone"][0]) == [3, 6, 7]
    assert [path.name for path in (folder / "alone").glob("save*")] == ["save"]
    assert figures(runs["asked"]) == figures(runs["alone"])
    assert saved(runs["asked"][0]) == [2, 3, 6, 7]
    assert sorted(path.name for path in (folder / "asked").glob("save*")) == [f"saved_at_{at}" for at in ASKED]
    said = [line for line in runs["asked"][0]["stdout"].splitlines() if line.startswith("sla-megatron: iteration")]
    assert said == [
        f"sla-megatron: iteration {at} is saved, as {folder / 'asked' / 'save'} asked; it is now saved_at_{at}"
        for at in ASKED
    ]
    assert "saved, as" not in runs["asked"][1]["stdout"]


def test_the_checkpoint_is_whole(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    whole, resumed = figures(runs["alone"]), figures(runs["resumed"])
    assert problem(folder / "asked" / "checkpoints" / f"iter_{ASKED[0]:07d}") is None
    assert resumed["iteration"] == list(range(ASKED[0] + 1, LAST + 1))
    for what in ("loss", "grad_norm"):
        assert resumed[what] == whole[what][ASKED[0] :]


def test_the_signal_counts_more(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Rank 0 sees the file and rank 1 gets SIGTERM in one step: one save, for both, and the end."""
    answers = runs["told to end"]
    assert [answer["status"] for answer in answers] == [0, 0]
    assert answers[0]["iteration"] == [1, 2, 3, 4, 5] and saved(answers[0]) == [3, 5]
    assert newest_complete(folder / "told to end" / "checkpoints") == (5, {})
    assert [path.name for path in (folder / "told to end").glob("save*")] == ["saved_at_5"]
