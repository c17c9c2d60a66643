"""The package as a house: few doors, each room says what belongs in it, and arrows point one way."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sla_megatron"
FOLDERS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    """What ``make lint`` has import-linter say of the package in ``folder``."""
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--no-cache",
        "--config",
        str(folder / "pyproject.toml"),
    ]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the package, to be broken."""
    shutil.copytree(PACKAGE, tmp_path / "sla_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_few_doors() -> None:
    """At most twelve names at the top."""
    names = [path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert len(names) <= 12, sorted(names)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_folder_says_what_it_may_import(folder: Path) -> None:
    """In its ``__init__``, which imports nothing itself: a folder can be entered without Megatron."""
    tree = ast.parse((folder / "__init__.py").read_text())
    text = ast.get_docstring(tree)
    assert text is not None and "mport" in text
    # ``__getattr__`` and the like would be code too; there is none.
    assert len(tree.body) == 1


def test_the_order_names_every_folder() -> None:
    """The layers of pyproject.toml, each name once."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = [name.strip() for layer in contracts[0]["layers"] for name in layer.split("|")]
    assert sorted(named) == sorted([*(folder.name for folder in FOLDERS), "pretrain_gpt"])


def test_arrows_point_one_way(house: Path) -> None:
    """As it stands every contract is kept."""
    done = lint_imports(house)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("common/files.py", "from ..attention import roles"),
        ("upstream/seams.py", "from ..commands.patch import registry"),
        ("attention/roles.py", "from ..cpu import tensors"),
        ("pipeline/routes.py", "from ..cpu import tensors"),
        ("pipeline/routes.py", "from ..attention import roles"),
        ("flags/validation.py", "from ..model import report"),
        ("hf/modeling_sla_gpt.py", "from ..attention import roles"),
        ("hf/serving/cache_plan.py", "from ...common import files"),
        ("commands/plan/job.py", "from ..sweep import grid"),
        ("commands/data/cli.py", "def late() -> None:\n    from ...pretrain_gpt import main"),
    ],
)
def test_a_wrong_arrow_is_found(house: Path, path: str, line: str) -> None:
    """One import upwards, or sideways, within a function too, and the linter ends with an error that names it."""
    with (house / "sla_megatron" / path).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint_imports(house)
    module = "sla_megatron." + path.removesuffix(".py").replace("/", ".")
    assert done.returncode == 1 and f"{module} -> " in done.stdout, done.stdout + done.stderr


def test_no_function_is_longer_than_a_screen() -> None:
    """60 lines at most."""
    long = [
        f"{path.relative_to(PACKAGE)}:{node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert long == []
