"""Upstream's own ``pretrain_gpt.py``, patched, in real checkouts: it trains as this project's entry point does.

Needs a clone of NVIDIA/Megatron-LM: ``MEGATRON_LM_REPO=/path/to/clone``, which is only read.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sla_megatron.upstream.megatron_version import CHECKED_WITH, VERSION_FILE, minor_of, version_in
from tests.support.launch import start_ranks, wait_for_ranks
from tests.support.runs import CPU_FLAGS, ITERATIONS, argv

REPOSITORY = os.environ.get("MEGATRON_LM_REPO")

needs_clone = pytest.mark.skipif(not REPOSITORY, reason="MEGATRON_LM_REPO names no clone of NVIDIA/Megatron-LM")

#: Those that the project says it was checked with.
REVISIONS = {"0.19": "core_v0.19.0", "0.20": "d98e8a64ddf34856e74b24714e3bedb2f5a39553"}

SLA = {"sla": True, "sla_skip_distance": 2, "sla_num_skip_groups": 2}
RUNS = {
    "sla": argv(**SLA),
    "pipeline": argv(**SLA, tensor_model_parallel_size=1, pipeline_model_parallel_size=2),
}

#: This project's entry point, on the Megatron of a checkout.
OURS = """
import sys
sys.path.insert(0, {checkout!r})
from sla_megatron.pretrain_gpt import main
main()
"""

#: Upstream's script as it is; only the CPU backend is entered.
UPSTREAM = """
import runpy, sys
sys.path.insert(0, {checkout!r})
from sla_megatron import megatron_device
with megatron_device([]):
    runpy.run_path({checkout!r} + "/pretrain_gpt.py", run_name="__main__")
"""


def git(folder: str | Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def sla_patch(command: str, folder: Path) -> int:
    return subprocess.run([sys.executable, "-m", "sla_megatron.commands.patch.cli", command, folder]).returncode


@pytest.fixture(scope="module", params=REVISIONS)
def checkout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout of one supported version, with the dataset helpers that Megatron would compile."""
    folder = tmp_path_factory.mktemp(request.param) / "Megatron-LM"
    git(".", "clone", "--quiet", "--shared", "--no-checkout", REPOSITORY, str(folder))
    try:
        git(folder, "checkout", "--quiet", REVISIONS[request.param])
    except subprocess.CalledProcessError:
        pytest.skip(f"{REPOSITORY} does not have {REVISIONS[request.param]}")
    installed = Path(importlib.util.find_spec("megatron.core").origin).parent / "datasets"
    for helpers in installed.glob("helpers_cpp*.so"):
        # Not copied with its time: make compiles what is older than its source.
        shutil.copyfile(helpers, folder / "megatron/core/datasets" / helpers.name)
    assert git(folder, "status", "--porcelain") == ""
    return folder


@pytest.fixture
def launch(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[str], str]]:
    """Run Python on two ranks: the losses and gradient norms that Megatron prints, and all that was printed."""
    # make asks python3-config for the name of the helpers.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).resolve().parent}:{os.environ['PATH']}")

    def run(name: str, command: list[str]) -> tuple[list[str], str]:
        folder = tmp_path / name
        wait_for_ranks(start_ranks([word.format(checkout=str(checkout)) for word in command], 2, folder), folder, 500)
        log = "".join((folder / f"rank{rank}.log").read_text() for rank in (0, 1))
        figures = re.findall(r"(?:lm loss|grad norm|lm loss value): *([0-9.E+-]+)", log)
        assert len(figures) == 2 * ITERATIONS + 2, "each step's, validation's and test's"
        return figures, log

    return run


def test_the_revisions_are_those_that_are_stated() -> None:
    """Tags by name, commits by their first digits."""
    assert [minor for minor, checked in CHECKED_WITH.items() if REVISIONS[minor][:8] in checked] == list(REVISIONS)


@needs_clone
@pytest.mark.distributed
@pytest.mark.slow
def test_patched_it_trains_as_before_and_as_our_entry_point_does(checkout: Path, launch: Callable) -> None:
    """Without --sla upstream's figures; with it ours, tensor-parallel and in a pipeline; taken back, a clean tree."""
    minor, patched = minor_of(version_in(checkout / VERSION_FILE)), "{checkout}/pretrain_gpt.py"
    upstream, _ = launch("upstream", ["-c", UPSTREAM, *argv(), *CPU_FLAGS])
    assert [sla_patch(command, checkout) for command in ("check", "apply", "apply", "check")] == [1, 0, 0, 0]
    assert git(checkout, "status", "--porcelain") == " M pretrain_gpt.py\n"
    dense, log = launch("dense", [patched, *argv()])
    assert dense == upstream
    assert "K/V" not in log
    for name, flags in RUNS.items():
        figures, log = launch(name, [patched, *flags])
        assert re.search(rf"Megatron-Core version \.+ {re.escape(minor)}\.", log), "the checkout's, not the wheel's"
        assert "sla-megatron: distance 2; 2 of 4 K/V groups skip" in log
        assert figures == launch(f"{name}-ours", ["-c", OURS, *flags])[0]
        assert figures != dense
    assert sla_patch("revert", checkout) == 0
    assert git(checkout, "status", "--porcelain") == ""


@needs_clone
def test_every_touched_name_is_in_the_checkout(checkout: Path) -> None:
    """As expected, in the Megatron that would run."""
    done = subprocess.run(
        [sys.executable, "-m", "sla_megatron.commands.patch.cli", "registry", checkout], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert re.fullmatch(r"(\d+) of \1 names fit\n", done.stdout)


@needs_clone
@pytest.mark.parametrize("tag", ["core_v0.17.0", "core_v0.18.2"])
def test_an_older_checkout_is_refused(tag: str, tmp_path: Path) -> None:
    """And left clean."""
    folder = tmp_path / "Megatron-LM"
    git(".", "clone", "--quiet", "--shared", "--branch", tag, REPOSITORY, str(folder))
    assert [sla_patch(command, folder) for command in ("check", "apply", "revert")] == [2, 2, 2]
    assert git(folder, "status", "--porcelain") == ""
