"""Upstream's own ``pretrain_gpt.py`` and ``pretrain_hybrid.py``, patched, in real checkouts: they train as this
project's entry point does.

Needs a clone of NVIDIA/Megatron-LM: ``MEGATRON_LM_REPO=/path/to/clone``, which is only read.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sla_megatron.upstream.megatron_version import CHECKED_WITH
from tests.support.launch import start_ranks, wait_for_ranks
from tests.support.runs import CPU_FLAGS, argv
from tests.support.upstream import REVISIONS, check_out, compiled_helpers

REPOSITORY = os.environ.get("MEGATRON_LM_REPO")

needs_clone = pytest.mark.skipif(not REPOSITORY, reason="MEGATRON_LM_REPO names no clone of NVIDIA/Megatron-LM")

STEPS = 3
SLA = {"sla": True, "sla_skip_distance": 2, "sla_num_skip_groups": 2}
PIPELINE = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2}

#: Script -> what it builds 4 layers of attention of.  Dropout would be drawn by a hybrid model's layers in other turns.
SCRIPTS = {"pretrain_gpt.py": {}, "pretrain_hybrid.py": {"num_layers": None, "hybrid_layer_pattern": "*-" * 4}}

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
    if not check_out(Path(REPOSITORY), REVISIONS[request.param], folder):
        pytest.skip(f"{REPOSITORY} does not have {REVISIONS[request.param]}")
    for helpers in compiled_helpers():
        # Not copied with its time: make compiles what is older than its source.
        shutil.copyfile(helpers, folder / "megatron/core/datasets" / helpers.name)
    assert git(folder, "status", "--porcelain") == ""
    return folder


@pytest.fixture
def launch(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[str], str]]:
    """Run Python on two ranks: the losses and gradient norms that Megatron prints, and all that was printed."""
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"):
        # Whose Megatron ran is seen by what Python compiled.
        monkeypatch.delenv(name, raising=False)
    # make asks python3-config for the name of the helpers.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).resolve().parent}:{os.environ['PATH']}")

    def run(name: str, command: list[str]) -> tuple[list[str], str]:
        folder = tmp_path / name
        compiled = checkout / "megatron/training/__pycache__"
        shutil.rmtree(compiled, ignore_errors=True)
        wait_for_ranks(start_ranks([word.format(checkout=str(checkout)) for word in command], 2, folder), folder, 500)
        log = "".join((folder / f"rank{rank}.log").read_text() for rank in (0, 1))
        figures = re.findall(r"(?:lm loss|grad norm|lm loss value): *([0-9.E+-]+)", log)
        assert len(figures) == 2 * STEPS + 2, "each step's, validation's and test's"
        assert compiled.is_dir(), "the checkout's Megatron ran, not the wheel's"
        return figures, log

    return run


def test_the_revisions_are_those_that_are_stated() -> None:
    """Tags by name, commits by their first digits."""
    assert [line for line, checked in CHECKED_WITH.items() if REVISIONS[line][:8] in checked] == list(REVISIONS)


@needs_clone
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_patched_it_trains_as_our_entry_point_does(
    checkout: Path, launch: Callable, script: str, card: Callable
) -> None:
    """With --sla and without, tensor-parallel and in a pipeline; taken back, a clean tree."""
    model = SCRIPTS[script] | {"train_iters": STEPS}
    runs = {"dense": {}, "sla": SLA, "pipeline": SLA | PIPELINE}
    patched = f"{{checkout}}/{script}"
    assert [sla_patch(command, checkout) for command in ("check", "apply", "apply", "check")] == [1, 0, 0, 0]
    assert git(checkout, "status", "--porcelain") == "".join(f" M {name}\n" for name in SCRIPTS)
    found = {}
    try:
        for name, flags in runs.items():
            words = argv(**model | flags)
            found[name], log = launch(name, [patched, *words])
            assert ("sla-megatron: distance 2; 2 of 4 K/V groups skip" in log) == (name != "dense")
            assert found[name] == launch(f"{name}-ours", ["-c", OURS, *words])[0]
    finally:
        assert sla_patch("revert", checkout) == 0
    assert found["dense"] not in (found["sla"], found["pipeline"])
    assert git(checkout, "status", "--porcelain") == ""
    results = {f"losses and gradient norms, {name}, of both": figures for name, figures in found.items()}
    revision = git(checkout, "describe", "--tags", "--always").strip()
    card("megatron-lm-checkout", f"sla-patch apply Megatron-LM  # {revision}", results)


@needs_clone
@pytest.mark.distributed
@pytest.mark.slow
def test_patched_and_without_sla_it_is_upstream_s(checkout: Path, launch: Callable) -> None:
    """The figures of the script as it is; that for hybrid models needs Transformer Engine without the patch."""
    words = argv(train_iters=STEPS)
    upstream, _ = launch("upstream", ["-c", UPSTREAM, *words, *CPU_FLAGS])
    assert sla_patch("apply", checkout) == 0
    try:
        dense, log = launch("dense", ["{checkout}/pretrain_gpt.py", *words])
    finally:
        assert sla_patch("revert", checkout) == 0
    assert dense == upstream
    assert "K/V" not in log


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
