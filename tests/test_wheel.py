"""The wheel, made as for a release: what is in it, and what it does where there is no Megatron and no checkout."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sla_megatron import __version__
from sla_megatron.commands.plan import cli
from tests.support.launch import ROOT

#: What e565a8e exported, and the logits that it printed of it.
WRITTEN = ROOT / "tests" / "data" / "e565a8e"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of a source distribution, which is made of a copy of the tree; with what is installed, from no index."""
    copy, made = tmp_path_factory.mktemp("tree") / "copy", tmp_path_factory.mktemp("dist")
    left_out = (".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left_out))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made), str(copy)]
    environment = os.environ | {"PIP_NO_INDEX": "1"}
    done = subprocess.run(command, cwd=made, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in made.iterdir()) == [
        f"sla_megatron-{__version__}-py3-none-any.whl",
        f"sla_megatron-{__version__}.tar.gz",
    ]
    return made / f"sla_megatron-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel and what is installed here, without Megatron."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in Path(pytest.__file__).parents[1].iterdir():
        if not re.match(r"megatron|sla_megatron|__editable__|.*\.pth$", path.name):
            (packages / path.name).symlink_to(path)
    found = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(found), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return found


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess:
    """In a folder outside of the checkout, with nothing of it on the path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_what_is_in_it(wheel: Path) -> None:
    """Every module and patch, and nothing else: no tests, examples or benchmarks."""
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sla_megatron").rglob("*.py")}
    patches = {f"sla_megatron/commands/patch/patches/{path.name}" for path in (ROOT / "patches").glob("*.patch")}
    assert patches and "sla_megatron/hf/modeling_sla_gpt.py" in modules
    assert sorted(names) == sorted(modules | patches)


def test_what_it_says_of_itself(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        folder = f"sla_megatron-{__version__}.dist-info"
        metadata, entries = (opened.read(f"{folder}/{name}").decode() for name in ("METADATA", "entry_points.txt"))
    assert f"\nVersion: {__version__}\n" in metadata
    assert metadata.endswith((ROOT / "README.md").read_text())
    assert "\nDescription-Content-Type: text/markdown\n" in metadata
    assert re.search(r"\[vllm.general_plugins\]\nsla_gpt = sla_megatron.hf.serving.vllm_plugin:register\n", entries)
    commands = re.findall(r"^(sla-\w+) = ", entries, re.MULTILINE)
    assert {"sla-plan", "sla-pretrain"} < set(commands)


def test_the_environment_has_no_megatron(python: Path, tmp_path: Path) -> None:
    """Or what follows would say nothing; nor does it have the checkout."""
    done = run([python, "-c", "import sla_megatron; print(sla_megatron.__file__); import megatron"], tmp_path)
    assert done.stdout.startswith(str(python.parents[1]))
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'megatron'\n")


def test_a_plan_is_made_without_megatron(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The README's, figure by figure as here, which ``test_plan_without_megatron.py`` holds against Megatron.

    torch is not imported either.
    """
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"^```sh\n(sla-plan .*?)^```", readme, re.MULTILINE | re.DOTALL)
    flags = [*shlex.split(command.replace("\\\n", ""))[1:], "--json", "-"]
    done = run([python, "-X", "importtime", python.with_name("sla-plan"), *flags], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = set(re.findall(r"^import time: .*\| *(\w+)", done.stderr, re.MULTILINE))
    assert "sla_megatron" in imported and not imported & {"torch", "transformers"}

    monkeypatch.setattr(cli, "megatron_origin", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sla-plan", *flags])
    cli.main()
    assert json.loads(done.stdout) == json.loads(capsys.readouterr().out)


GENERATE = """
import importlib.util, sys, torch
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("megatron") is None
model = AutoModelForCausalLM.from_pretrained("export", trust_remote_code=True).eval()
tokens = torch.randint(121, (2, 8), generator=torch.Generator().manual_seed(1))
written = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(written[:, 8:].tolist())
"""


def test_an_export_generates_without_megatron(python: Path, tmp_path: Path) -> None:
    """With the model's code of the wheel: the first token is the one of the logits that e565a8e printed."""
    shutil.copytree(WRITTEN / "export" / "full", tmp_path / "export")
    for path in python.parents[1].glob("lib/python*/site-packages/sla_megatron/hf/*_sla_gpt.py"):
        shutil.copy(path, tmp_path / "export")
    done = run([python, "-W", "ignore", "-c", GENERATE], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = load_file(WRITTEN / "expected" / "full.logits.safetensors")
    first = expected["logits"][:, -1].argmax(-1).tolist()
    written = json.loads(done.stdout.splitlines()[-1])
    assert [tokens[0] for tokens in written] == first
    assert [len(tokens) for tokens in written] == [4, 4]
    assert version("transformers").startswith("5.")
