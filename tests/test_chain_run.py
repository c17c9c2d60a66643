"""What a chain of attempts adds to a run, and what its users ask of it by files: its training stays what it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sla_megatron.commands.job.additions import additions
from sla_megatron.commands.job.staging import stage_data, staged_flags
from sla_megatron.common.checkpoint_folders import newest_complete, problem
from tests.support.indexed_files import write_indexed
from tests.support.runs import argv, figures, train_on_all_ranks
from tests.support.wandb_files import recorded

pytestmark = pytest.mark.distributed

INTERVAL, LAST = 3, 7
#: Where somebody asks for a checkpoint: at a step of no save, at one where Megatron saves, and at the last, after which
#: it does.
ASKED = (2, 3, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain-run")


def flags_of(save: Path, data: list[str], **more: object) -> list[str]:
    """TP=2, dropout on: its random state must come back as well."""
    common = {"sla": True, "sla_skip_distance": 2, "train_iters": LAST, "eval_iters": 0, "save_interval": INTERVAL}
    common |= {"mock_data": False, "data_path": data, "split": "1,0,0", "seed": 7, "exit_signal_handler": True}
    return argv(**common | {"save": save} | more)


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """One alone, its data where they are; one as a chain starts it, in two attempts; and one that is told to end."""
    (folder / "data").mkdir()
    prefixes = [write_indexed(folder / "data" / name, documents) for name, documents in (("a", 150), ("b", 200))]
    data = ["0.3", prefixes[0], "0.7", prefixes[1]]
    chain, disk = folder / "chain", folder / "disk"

    def touched(run: Path, *iterations: int) -> dict[str, str]:
        run.mkdir(exist_ok=True)
        return {str(iteration): str(run / "save") for iteration in iterations}

    def attempt(**more: object) -> dict[str, Any]:
        flags = [*flags_of(chain / "checkpoints", data, **more), "--wandb-project", "p", "--wandb-exp-name", "gpt"]
        added = additions(chain, flags, lambda flag: True)
        environment = added.environment | {
            "SLA_RUN_FOLDER": str(chain),
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
        }
        return {"argv": [*added.flags, *staged_flags(flags, disk)], "environment": environment}

    # Whoever does not start a chain may have such a file.
    alone, told = folder / "alone", folder / "told"
    requests = {"alone": {"argv": flags_of(alone / "checkpoints", data), "touched": touched(alone, *ASKED)}}
    stop = {"touched": touched(told, 5), "signalled": [1, 5], "environment": {"SLA_RUN_FOLDER": str(told)}}
    requests["told"] = {"argv": flags_of(told / "checkpoints", data)} | stop
    on_chain = touched(chain, *ASKED)
    requests["first"] = attempt() | {"touched": on_chain}
    requests["second"] = attempt(load=chain / "checkpoints", ckpt_step=ASKED[0])
    stage_data(["--data-path", *data], disk, "node1", lambda line: None)
    return train_on_all_ranks(requests, 2, folder / "ranks")


def saved(answer: dict[str, Any]) -> list[int]:
    """The iterations that Megatron said it saved, each as often as it did."""
    return [
        int(found) for found in re.findall(r"successfully saved checkpoint from iteration +(\d+)", answer["stdout"])
    ]


def test_a_checkpoint_more_and_no_other_training(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """None twice where Megatron saves itself; losses and norms are those of the run that heeds no file, bit for bit.

    Its data are elsewhere too, and their cache.
    """
    assert saved(runs["alone"][0]) == [3, 6, 7]
    assert [path.name for path in (folder / "alone").glob("save*")] == ["save"]
    assert figures(runs["first"]) == figures(runs["alone"])
    assert saved(runs["first"][0]) == [2, 3, 6, 7]
    chain = folder / "chain"
    assert sorted(path.name for path in chain.glob("save*")) == [f"saved_at_{at}" for at in ASKED]
    said = [line for line in runs["first"][0]["stdout"].splitlines() if line.startswith("sla-megatron: iteration")]
    asked = f"is saved, as {chain / 'save'} asked; it is now"
    assert said == [f"sla-megatron: iteration {at} {asked} saved_at_{at}" for at in ASKED]
    assert asked not in runs["first"][1]["stdout"]


def test_the_checkpoint_is_whole(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    whole, resumed = figures(runs["alone"]), figures(runs["second"])
    assert problem(folder / "chain" / "checkpoints" / f"iter_{ASKED[0]:07d}") is None
    assert resumed["iteration"] == list(range(ASKED[0] + 1, LAST + 1))
    for what in ("loss", "grad_norm"):
        assert resumed[what] == whole[what][ASKED[0] :]


def test_the_signal_counts_more(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Rank 0 sees the file and rank 1 gets SIGTERM in one step: one save, for both, and the end."""
    answers = runs["told"]
    assert [answer["status"] for answer in answers] == [0, 0]
    assert answers[0]["iteration"] == [1, 2, 3, 4, 5] and saved(answers[0]) == [3, 5]
    assert newest_complete(folder / "told" / "checkpoints") == (5, {})
    assert [path.name for path in (folder / "told").glob("save*")] == ["saved_at_5"]


def test_the_data_cache_is_the_runs(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Built in the first attempt alone; nothing is written where the data are, as it is without the flag."""
    built = list((folder / "chain" / "data-cache").iterdir())
    assert len(built) > 10 and max(path.stat().st_mtime for path in built) < runs["second"][0]["began"]
    assert not [path for path in (folder / "disk").rglob("*") if "cache" in path.parts]
    assert list((folder / "data").rglob("cache/GPTDataset_indices/*.npy"))


def test_two_attempts_are_one_run_of_the_trackers(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """In W&B's own files, offline, and in TensorBoard's folder, by the steps that Megatron logged."""
    pytest.importorskip("wandb")
    (first, steps), (second, more) = sorted(recorded(folder / "chain" / "wandb"), key=lambda found: found[1])
    assert first == second and (steps, more) == ([1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7])
    assert len(list((folder / "chain" / "tensorboard").glob("events.out.tfevents.*"))) == 2
