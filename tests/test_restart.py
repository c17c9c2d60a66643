"""A run that fails anywhere, and the next one in the same processes, as in-process restart has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import free_ports, run_worker
from tests.support.pipelines import MODELS, TWO_RANKS
from tests.support.runs import argv

pytestmark = pytest.mark.distributed

STEPS, MICROBATCHES = 2, 4

MODEL = MODELS["gqa-full-long-and-short"]
RECOMPUTATION = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": TWO_RANKS["pp2"].argv() | RECOMPUTATION,
    "pp2v2": TWO_RANKS["pp2v2"].argv(),
}

#: In the second step, with K/V of several microbatches under way: layout, place, rank, layer, its how-many-eth time.
FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "building": ("pp2v2", {"place": "building", "rank": 0, "count": 2}),
    "chunk": ("pp2v2", {"place": "chunk", "rank": 1, "count": 2 * MICROBATCHES + 4}),
    "layer": ("pp2v2", {"place": "layer", "rank": 0, "layer": 6, "count": MICROBATCHES + 2}),
    "attention": ("pp2v2", {"place": "attention", "rank": 0, "layer": 5, "count": MICROBATCHES + 2}),
    "backward": ("pp2v2", {"place": "backward", "rank": 1, "layer": 4, "count": MICROBATCHES + 3}),
    "recomputation": ("pp2", {"place": "recomputation", "rank": 0, "layer": 3, "count": MICROBATCHES + 2}),
}


def _argv(layout: str) -> list[str]:
    return argv(**MODEL.argv() | LAYOUTS[layout] | {"train_iters": STEPS, "eval_iters": 0})


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """First a good run of each layout, then those that fail, one after the other, then good ones again."""
    requests: dict[str, dict[str, Any]] = {f"{layout} before": {"argv": _argv(layout)} for layout in LAYOUTS}
    requests |= {name: {"argv": _argv(layout), "fault": fault} for name, (layout, fault) in FAULTS.items()}
    requests |= {f"{layout} after": {"argv": _argv(layout)} for layout in LAYOUTS}
    for request, port in zip(requests.values(), free_ports(len(requests)), strict=True):
        request["port"] = port
    ranks = run_worker("restart_worker", requests, 2, tmp_path_factory.mktemp("restart"))
    return {name: [rank[name] for rank in ranks] for name in requests}


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_fails(answers: dict[str, list[dict[str, Any]]], name: str) -> None:
    """On its rank with what was injected, on the other since the connection is gone; up to there it was as before.

    It is itself a run after others that failed.  Of the steps the last rank alone knows the loss, and each the norm.
    """
    layout, fault = FAULTS[name]
    errors = [rank["error"] for rank in answers[name]]
    assert errors[fault["rank"]] == "Fault"
    assert None not in errors
    for found, before in zip(answers[name], answers[f"{layout} before"], strict=True):
        for what in ("loss", "grad_norm"):
            assert found[what] == before[what][: len(found[what])]
    assert len(answers[name][fault["rank"]]["loss"]) == (0 if name == "building" else STEPS - 1)


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_left_of_it(answers: dict[str, list[dict[str, Any]]], name: str) -> None:
    """No shared K/V but those that its exception holds, no replaced name, no open microbatch or step."""
    for rank in answers[name]:
        assert rank["alive"] == 0
        assert rank["left"] == []
    if name != "building":
        assert answers[name][FAULTS[name][1]["rank"]]["held"] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fresh_run_is_as_if_nothing_had_been(answers: dict[str, list[dict[str, Any]]], layout: str) -> None:
    """Bit for bit."""
    for before, after in zip(answers[f"{layout} before"], answers[f"{layout} after"], strict=True):
        assert before["error"] is None and len(before["grad_norm"]) == STEPS
        assert after == before


def test_restarts_in_its_process(tmp_path: Path) -> None:
    """With upstream's in-process restart, in one process; on gloo nothing wakes others that wait for it."""
    assert_restarts(1, {"tensor_model_parallel_size": 1}, tmp_path)


def assert_restarts(size: int, layout: dict[str, Any], folder: Path) -> None:
    """A run in which a rank fails in the second step starts again by itself, and trains as if it had not."""
    pytest.importorskip("nvidia_resiliency_ext")
    flags = MODEL.argv() | layout | {"train_iters": STEPS, "eval_iters": 0}
    # Nothing is saved; the package's own writer would be looked for when a run is ended.
    restarting = flags | {"inprocess_restart": True, "inprocess_granularity": "rank", "async_strategy": "mcore"}
    fault = {"place": "layer", "rank": 0, "layer": 6, "count": MICROBATCHES + 2}
    requests: dict[str, dict[str, Any]] = {
        "whole": {"argv": argv(**flags)},
        "restarted": {"argv": argv(**restarting), "fault": fault},
    }
    found = {}
    for name, request in requests.items():
        # Each in processes of its own: the package starts its monitor by a fork, before there are any threads.
        alone = {name: request | {"port": free_ports(1)[0]}}
        found[name] = [rank[name] for rank in run_worker("restart_worker", alone, size, folder / name)]
    for whole, restarted in zip(*found.values(), strict=True):
        assert (whole["error"], restarted["error"], restarted["alive"]) == (None, None, 0)
        for what in ("loss", "grad_norm"):
            assert restarted[what] == [*whole[what][: STEPS - 1], *whole[what]]
