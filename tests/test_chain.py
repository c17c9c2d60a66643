"""When a chain of attempts is finished: when Megatron itself would train no more, by the checkpoints that it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sla_megatron.commands.job.chain import FINISHED, REQUEUE, Chain, begin, end
from sla_megatron.commands.job.flags import training_flags
from sla_megatron.common.checkpoint_folders import newest_complete
from tests.support.runs import argv, train_on_all_ranks

pytestmark = pytest.mark.distributed

EXIT = 4

#: How long training is, in each way that Megatron has.
LENGTHS = {
    "iterations": {"train_iters": 6, "global_batch_size": 4},
    "samples": {"train_samples": 26, "global_batch_size": 4},
    # Of the layout: 2 samples a microbatch on one rank.
    "samples, batch of the layout": {"train_samples": 13, "global_batch_size": None},
    # In tokens: from 8 samples of 16 on, batches of 4.
    "samples, growing batch": {
        "train_samples": 22,
        "global_batch_size": None,
        "step_batch_size_schedule": "0:2 128:4",
    },
}


def flags_of(length: str, folder: Path, **more: object) -> list[str]:
    """One rank, which saves at its end alone."""
    by_samples = {"train_iters": None, "lr_warmup_iters": None, "lr_decay_iters": None}
    own = (by_samples if "train_samples" in LENGTHS[length] else {}) | LENGTHS[length] | more
    common = {"num_layers": 1, "tensor_model_parallel_size": 1, "eval_iters": 0, "save_interval": 100}
    return argv(**common | own, save=folder, load=folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """Each length trained to its end, and to an exit before; the folder, and the iterations that Megatron made."""
    folder = tmp_path_factory.mktemp("lengths")
    requests = {}
    for length in LENGTHS:
        requests[f"{length} whole"] = {"argv": flags_of(length, folder / f"{length} whole")}
        requests[f"{length} part"] = {"argv": flags_of(length, folder / f"{length} part", exit_interval=EXIT)}
    answers = train_on_all_ranks(requests, 1, folder / "ranks")
    for answer in answers.values():
        assert answer[0]["status"] in (0, None), answer[0]["stderr"]
    return folder, {name: answer[0]["iteration"] for name, answer in answers.items()}


@pytest.mark.parametrize("length", LENGTHS)
def test_finished_is_what_megatron_calls_finished(
    length: str, trained: tuple[Path, dict[str, list[int]]], tmp_path: Path
) -> None:
    """After an exit of its own, with status 0, a run goes on; at its end the next attempt has nothing to do."""
    folder, iterations = trained
    last = iterations[f"{length} whole"][-1]
    assert last > EXIT == iterations[f"{length} part"][-1]
    for part, verdict in (("part", REQUEUE), ("whole", FINISHED)):
        save = folder / f"{length} {part}"
        flags = training_flags(flags_of(length, save))
        assert newest_complete(save)[0] == iterations[f"{length} {part}"][-1]
        run, said = tmp_path / part, []
        run.mkdir()
        began = {"job": "1", "nodes": "node1", "began": "then", "began_at": 0}
        (run / "chain.json").write_text(json.dumps({"attempts": [began]}))
        assert end(Chain.read(run), flags, 0, False, 3, said.append) == verdict, said
        assert begin(Chain.read(run), flags, "1", "node1", 3, said.append) == verdict, said
        assert (f"finished: iteration {last} of {last}" in said) == (part == "whole")
    # An evaluation of what is finished is not, until it has been made.
    flags = training_flags([*flags_of(length, folder / f"{length} whole"), "--skip-train"])
    assert begin(Chain.read(run), flags, "1", "node1", 3, said.append) == REQUEUE
    assert end(Chain.read(run), flags, 0, False, 3, said.append) == FINISHED
