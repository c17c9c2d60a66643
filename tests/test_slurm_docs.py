"""The pages on Slurm and containers: their commands are accepted, and what they name is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sla_megatron.commands.job.resources import OVERRIDES
from tests.support.documented.parsers import sbatch_flags
from tests.support.launch import ROOT

SCRIPT = (ROOT / "launch" / "slurm.sbatch").read_text()
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text()
    for name in ("slurm_own_script", "slurm_sites", "slurm_disks", "containers")
}
PAGES["launch"] = (ROOT / "launch" / "README.md").read_text()
PAGES["slurm"] = (ROOT / "docs" / "slurm.md").read_text()

#: In the place of sbatch: it takes options that the real one lists, and shows what the job would run.
SBATCH = """#!/bin/bash
while [[ $1 == --* ]]; do
    [ -z "$OPTIONS" ] || [[ " $OPTIONS " == *" ${1%%=*} "* ]] || { echo "no option of sbatch: $1" >&2; exit 1; }
    shift
done
DRY_RUN=1 exec bash "$@"
"""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def login_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages have in /shared, and in bin/ a sbatch."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "sla-megatron").symlink_to(ROOT)
    checkout = folder / "Megatron-LM"
    checkout.mkdir()
    (checkout / ".venv").symlink_to(sys.prefix)
    # What takes flags of these names, and is asked for its --help alone.
    (checkout / "pretrain_gpt.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\n"
        "for flag in ('--save', '--load', '--save-interval', '--tensorboard-dir'): parser.add_argument(flag)\n"
        "parser.add_argument('--exit-signal-handler', action='store_true')\nparser.parse_known_args()\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text(SBATCH)
    (folder / "bin" / "sbatch").chmod(0o755)
    return folder


def shown(login_node: Path, command: str, folder: Path = ROOT) -> str:
    """The command that a documented one would have every node run, its line ends undone."""
    options = " ".join(sorted(sbatch_flags() or ()))
    own = {"NPROC": "8", "DRY_RUN": "1", "OPTIONS": options, "SLURM_NNODES": "4"}
    own["PATH"] = f"{login_node}/bin{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", command.replace("/shared", str(login_node))],
        cwd=folder,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return re.sub(r" \\\n +", " ", done.stdout)


def test_the_file_of_a_script_of_ones_own(login_node: Path) -> None:
    """The sbatch file after shows its command, with the flags that it has, and what the chain adds."""
    before, after = blocks("slurm_own_script", "bash")
    assert "srun" in before and "srun" not in after
    text = shown(login_node, after)
    assert "torch.distributed.run --nnodes 4 --nproc-per-node 8 " in text
    assert f" {login_node}/Megatron-LM/pretrain_gpt.py --tensorboard-dir " in text
    checkpoints = f"{login_node}/runs/gpt/checkpoints"
    assert f"--save {checkpoints} --load {checkpoints} --exit-signal-handler --tensor-model-parallel-size 2 " in text
    flags = after[after.index("--tensor-model") :].replace("\\\n", " ").replace("/shared", str(login_node))
    assert text.split()[-len(flags.split()) :] == flags.split()
    # What sbatch reads of the file that it is given, and not of the one that this calls.
    kept = set(re.findall(r"^#SBATCH (--(?:requeue|open-mode|signal).*)$", SCRIPT, re.MULTILINE))
    assert len(kept) == 3 and kept <= set(re.findall(r"^#SBATCH (.*)$", after, re.MULTILINE))


def test_the_command_without_a_file(login_node: Path) -> None:
    """Of the same page."""
    (command,) = blocks("slurm_own_script", "sh")
    assert command.rstrip().endswith("--num-layers 12 ...")
    text = shown(login_node, command.replace(" ...", ""))
    assert text.rstrip().endswith("--exit-signal-handler --num-layers 12")


def test_the_command_in_a_container(login_node: Path) -> None:
    """With pyxis and with apptainer: the image, its mounts, and the container's Python."""
    (command,) = [block for block in blocks("containers", "sh") if "launch/slurm.sbatch" in block]
    for runtime, words in (
        ("pyxis", ["--container-image=/images/sla-megatron.sqsh", f"--container-mounts=/data:/data,{ROOT}:{ROOT}"]),
        ("apptainer", ["apptainer exec --nv", f"--bind /data:/data,{ROOT}:{ROOT}", "/images/sla-megatron.sqsh bash"]),
    ):
        text = shown(login_node, f"export CONTAINER_RUNTIME={runtime}\n{command}")
        assert [word for word in words if word not in text] == [], text
        assert " python3 -m torch.distributed.run " in text and " --swiglu " in text


@pytest.mark.parametrize("page", ["slurm", "launch"])
def test_the_first_job(page: str, login_node: Path) -> None:
    """The command that the page has submitted; of the runbook, what comes before it too."""
    (command, *_) = [block for block in blocks(page, "sh") if "sbatch --job-name" in block]
    text = shown(login_node, f"export PYTHON={sys.executable}\n{command}")
    assert " -m torch.distributed.run --nnodes 4 --nproc-per-node 8 " in text and " --sla --train-iters 100000 " in text
    if page == "slurm":
        # The doctor is asked of the same.
        (doctor,) = [block for block in blocks(page, "sh") if block.startswith("sla-doctor")]
        flags = doctor.replace("\\\n", " ").partition("--train-iters")[2].partition(" --save runs")[0]
        assert " ".join(flags.split()) in text
        (dry,) = [block for block in blocks(page, "sh") if "DRY_RUN=1" in block]
        assert "--swiglu" in shown(login_node, dry)


def test_overrides_are_those_of_the_script() -> None:
    """Whatever the pages' tables name as one."""
    table = PAGES["containers"].partition("| override |")[2].partition("\n\n")[0]
    named = set(re.findall(r"^\| `([A-Z_]+)` \|", table, re.MULTILINE))
    assert {"CONTAINER_IMAGE", "CONTAINER_RUNTIME", "SETUP"} <= named <= set(OVERRIDES)
    assert all(f"{name}=" in SCRIPT for name in named)
    own = set(re.findall(r"`([A-Z][A-Z_]+)=", PAGES["slurm_own_script"]))
    assert own <= set(OVERRIDES), own - set(OVERRIDES)


def test_settings_are_named_as_slurm_names_them() -> None:
    """Each setting of a site's page is a word of Slurm's own library or of scontrol."""
    library = next(iter(sorted(Path("/usr/lib").glob("*/slurm*/libslurmfull*"))), None)
    if library is None:
        pytest.skip("needs Slurm's library")
    words = library.read_bytes() + Path(shutil.which("scontrol")).read_bytes()
    page = PAGES["slurm_sites"]
    settings = set(re.findall(r"`([A-Z][a-z]+[A-Z]\w+|Prolog|Epilog)\b[^`]*`", page))
    assert len(settings) > 25
    assert [name for name in sorted(settings) if name.encode() + b"\0" not in words] == []
    # No word of it stands there that it would not know.
    assert b"PreemptSignal\0" not in words
