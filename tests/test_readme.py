"""The README's commands do what the README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
HUGGING_FACE = (ROOT / "docs" / "huggingface.md").read_text()
PIPELINE = (ROOT / "docs" / "pipeline.md").read_text()


def test_first_command_comes_early() -> None:
    """Within the first 30 lines, and it is a target of the Makefile."""
    lines = README.splitlines()
    assert "make quickstart" in lines[: lines.index("```sh") + 2]
    assert lines.index("make quickstart") < 30


@pytest.mark.distributed
def test_own_run() -> None:
    """The run on two processes trains, and prints the very lines that the README shows."""
    (command,) = [block for block in BLOCKS if block.startswith("launch/local.sh")]
    (printed,) = [block for block in BLOCKS if block.startswith("sla-megatron:")]
    environment = os.environ | {"PYTHON": sys.executable, "NPROC": "2"}
    run = subprocess.run(
        ["sh", "-c", command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "iteration       10/      10" in run.stdout
    assert [line for line in printed.splitlines() if line not in run.stdout.splitlines()] == []


def _printed(command: str, folder: Path = ROOT) -> str:
    """What a documented command prints, with the commands of this environment."""
    search = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(
        ["sh", "-c", command], cwd=folder, env=os.environ | search, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_plans() -> None:
    """The README's command prints a ranking; the page on pipelines shows its command's whole output."""
    (command,) = [block for block in BLOCKS if block.startswith("sla-plan")]
    assert "Layouts of two pipeline ranks or more" in _printed(command)
    command, printed = re.findall(r"^```\w*\n((?:sla-plan|Model:).*?)^```", PIPELINE, flags=re.MULTILINE | re.DOTALL)
    assert _printed(command) == printed


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_the_export(tmp_path: Path) -> None:
    """The README's command, which the page on Hugging Face has too, on a checkpoint."""
    from tests.support.convert_models import save_random_checkpoint

    save_random_checkpoint(tmp_path / "checkpoints", {"sla": True, "sla_skip_distance": [3]})
    (command,) = [block for block in BLOCKS if block.startswith("sla-convert")]
    assert command in HUGGING_FACE
    assert "logits equal" in _printed(command, tmp_path)


def test_every_path_in_the_tree_exists() -> None:
    """The annotated tree names only what is there."""
    (tree,) = [block for block in BLOCKS if block.startswith("sla_megatron/\n")]
    for line in tree.splitlines():
        name = line.split()[0]
        folder = "sla_megatron/" if line.startswith("  ") else ""
        assert list(ROOT.glob(folder + name.rstrip("/"))), name


def test_every_flag_is_in_the_table() -> None:
    """The flag table and the parser have the same flags, but for Megatron's."""
    documented = set(re.findall(r"^\| `(--[a-z-]+)", README, flags=re.MULTILINE))
    package = ROOT / "sla_megatron"
    sources = (package / "flags" / "sla_flags.py").read_text() + (package / "cpu" / "device.py").read_text()
    assert documented == set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', sources))
