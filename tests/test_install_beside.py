"""The recipe for images: what is missing is installed beside a torch that stays; and the Dockerfile that uses it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from sla_megatron.common.requirements import (
    Package,
    canonicalize_name,
    installed,
    lacks,
    project_requirements,
    stays,
)
from tests.support.launch import ROOT

DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text()
PINNED = (ROOT / "constraints.txt").read_text()
VERSIONS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in PINNED.split())}
#: An environment with another torch, where CI has made it for vLLM's tests.
SERVING = ROOT / ".venv-serving"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """``launch/install_beside.py``, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("install_beside", ROOT / "launch" / "install_beside.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


#: What an image of NVIDIA's has, as this project sees it: an alpha by its number, and the numpy that it was built with.
IMAGE = {
    "torch": ("2.9.0a0+50eac811a6.nv25.9", ("triton==3.4.0; platform_system == 'Linux'", "sympy>=99")),
    "pytorch-triton": ("3.4.0+gitc817b9b6", ()),
    "transformer-engine": ("2.7.0+fedd9dd", ("pydantic", "onnxscript")),
    "apex": ("0.1", ()),
    "numpy": ("1.26.4", ()),
    "pandas": ("2.2.3", ("numpy>=1.26.0; python_version >= '3.12'", "python-dateutil>=2.8.2", "pytz>=2020.1")),
    "packaging": ("25.0", ()),
    "pyyaml": ("6.0.2", ()),
    "of-somebody": ("built-here", ("what (is this", "pyyaml>=5")),
}
OLD_HUB = {"huggingface-hub": ("0.34.4", ()), "tokenizers": ("0.21.4", ("huggingface-hub<1.0,>=0.16.4",))}
OLD_DATASETS = {"datasets": ("3.6.0", ("huggingface-hub<1.0,>=0.24.0", "pandas", "fsspec[http]<=2025.3.0"))}
STUDIO = {"an-image-of-somebodys": ("1.0", ("tokenizers<0.22", "numpy"))}


def packages(*parts: Mapping[str, tuple[str, tuple[str, ...]]]) -> dict[str, Package]:
    return {name: Package(name, *rest) for part in parts for name, rest in part.items()}


def pins_of_this_environment(wanted: Iterable[str]) -> list[Package]:
    """The packages of constraints.txt as they are installed here: what an index says of these versions."""
    return [here()[name] for name in wanted]


@functools.cache
def here() -> dict[str, Package]:
    return installed()


def without(names: Iterable[str]) -> dict[str, Package]:
    return {name: package for name, package in here().items() if name not in names}


@pytest.mark.parametrize(
    ("there", "installs", "leaves"),
    [
        (packages(IMAGE), {"megatron-core", "datasets", "transformers"}, {"numpy", "pandas", "packaging", "pyyaml"}),
        # By its number older than 2.6.
        (packages(IMAGE, {"torch": ("2.6.0a0+df5bbc09d1.nv24.12", ())}), {"megatron-core"}, {"numpy", "pandas"}),
        (packages(IMAGE, OLD_HUB), {"huggingface-hub", "tokenizers"}, {"pandas"}),
        (packages(IMAGE, OLD_HUB, OLD_DATASETS), {"datasets", "huggingface-hub"}, {"pandas"}),
        (without(["megatron-core", "tensorboard"]), {"megatron-core", "tensorboard"}, {"datasets", "transformers"}),
        (without([]), set(), {"megatron-core"}),
        # Neither torch's own needs nor CUDA's libraries are looked after.
        (without(["nvidia-nccl-cu13", "triton", "sympy"]), set(), {"megatron-core"}),
    ],
    ids=["nvidia", "an alpha", "too old", "asks for the old one", "two missing", "whole", "without torch's own"],
)
def test_what_is_chosen(recipe: ModuleType, there: dict[str, Package], installs: set[str], leaves: set[str]) -> None:
    """What is missing, and what is too old; afterwards nothing is; never an image's own."""
    chosen = recipe.choose(there, project_requirements(), recipe.pins(PINNED), pins_of_this_environment)
    assert installs <= chosen.keys() and not leaves & chosen.keys(), chosen.keys()
    assert bool(chosen) == bool(installs)
    assert not [name for name in chosen if stays(name)]
    future = there | {package.name: package for package in pins_of_this_environment(chosen)}
    assert lacks(future, project_requirements()) == []
    assert {name: choice.version for name, choice in chosen.items()} == {name: VERSIONS[name] for name in chosen}


@pytest.mark.parametrize(
    ("there", "lines"),
    [
        (
            {"torch": ("2.4.0a0+nv24.07", ())},
            ["sla-megatron asks for torch>=2.6 and finds 2.4.0a0+nv24.07, which stays"],
        ),
        ({"torch": None}, ["sla-megatron asks for torch>=2.6, and is left to the environment"]),
        ({"pandas": None}, ["pandas 3.1.1 asks for numpy>=2.0.2 and finds 1.26.4, which stays"]),
        (
            {"datasets": ("9", ("nobody-has-it>=2",))},
            ["datasets 9 asks for nobody-has-it>=2: constraints.txt has none"],
        ),
    ],
)
def test_what_is_refused(recipe: ModuleType, there: dict[str, tuple | None], lines: list[str]) -> None:
    """By name, before anything is installed: what stays and does not do, and what constraints.txt does not have."""
    image = {name: rest for name, rest in {**IMAGE, **there}.items() if rest is not None}
    with pytest.raises(recipe.Refusal) as refusal:
        recipe.choose(packages(image), project_requirements(), recipe.pins(PINNED), pins_of_this_environment)
    for line in lines:
        assert line in str(refusal.value).splitlines()


def test_who_asked_for_what_is_replaced(recipe: ModuleType) -> None:
    """It is said, and is no reason to end: the image's own program is its user's."""
    there = packages(IMAGE, OLD_HUB, STUDIO)
    chosen = recipe.choose(there, project_requirements(), recipe.pins(PINNED), pins_of_this_environment)
    assert recipe.complaints(there, chosen) == [
        f"an-image-of-somebodys 1.0 asks for tokenizers<0.22 and finds {chosen['tokenizers'].version}"
    ]


def test_an_environment_that_is_not_to_be_touched(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A distribution's own Python, unless its user says so, and a pip that cannot tell what it would install."""
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(recipe.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("PIP_BREAK_SYSTEM_PACKAGES", raising=False)
    recipe.require_usable()
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(
        recipe.Refusal, match="is the system's: expected a venv that sees its packages .*, or PIP_BREAK"
    ):
        recipe.require_usable()
    monkeypatch.setenv("PIP_BREAK_SYSTEM_PACKAGES", "1")
    recipe.require_usable()
    monkeypatch.setattr(recipe.importlib.metadata, "version", lambda name: "22.0.2")
    with pytest.raises(recipe.Refusal, match=r"pip is 22.0.2: expected 22.2 or newer"):
        recipe.require_usable()


# Environments with a pip that installs


def linked(folder: Path, names: Iterable[str]) -> Path:
    """A folder with this environment's packages of these names, to be put on another's path."""
    folder.mkdir(exist_ok=True)
    for name in names:
        for file in importlib.metadata.distribution(name).files:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(file.locate()).parents[len(file.parts) - 1] / top)
    return folder


def environment(folder: Path, *sites: Path) -> Path:
    """The interpreter of a new environment, which finds what is in ``sites`` too, as in an image."""
    venv.create(folder, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "sites.pth").write_text("".join(f"{site}\n" for site in sites))
    return folder / "bin" / "python"


def copied(folder: Path) -> Path:
    """What the Dockerfile copies, where it copies it; nothing else is there."""
    (workdir,) = re.findall(r"^WORKDIR (/\S+)$", DOCKERFILE, re.MULTILINE)
    to = folder / workdir[1:]
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        *sources, target = shlex.split(line)
        for source in sources:
            assert (ROOT / source).exists(), line
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (to / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, to / target)
    return to


def installs_beside(root: Path, python: Path, **settings: str) -> subprocess.CompletedProcess:
    """The Dockerfile's own line for it, in ``root``, where ``python`` is found before any other."""
    (command,) = re.findall(r"^RUN (.*)$", DOCKERFILE, re.MULTILINE)
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own["PATH"] = f"{python.parent}{os.pathsep}{own['PATH']}"
    return subprocess.run(
        ["sh", "-c", command], cwd=root, env=own | settings, capture_output=True, text=True, timeout=200
    )


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """A package that holds nothing but its name."""
    stem = f"{name.replace('-', '_')}-{version}"
    asked = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as file:
        info = f"{stem}.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{asked}")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], Path]:
    """A copy of the project, how pip finds wheels of all that it asks for, and the site of an image with torch 2.9."""
    folder = tmp_path_factory.mktemp("image")
    wheels, site = folder / "wheels", linked(folder / "site", ["pip", "setuptools", "packaging"])
    wheels.mkdir()
    for name in ("torch", "datasets", "sentencepiece", "transformers", "safetensors", "tqdm", "pyyaml", "tensorboard"):
        wheel(wheels, name, VERSIONS[name])
    wheel(wheels, "megatron-core", VERSIONS["megatron-core"], "torch>=2.6.0")
    wheel(folder, "torch", "2.9.0")
    with zipfile.ZipFile(folder / "torch-2.9.0-py3-none-any.whl") as file:
        file.extractall(site)
    # What NVIDIA's images set: all that they hold, pinned.
    (folder / "constraint.txt").write_text("torch==2.9.0\ntransformers==4.57.0\n")
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONSTRAINT": str(folder / "constraint.txt")}
    return copied(folder), settings, site


def version_of(package: str, python: Path) -> str:
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout.strip()


def test_the_doctor_has_the_last_word(image: tuple[Path, dict[str, str], Path], tmp_path: Path) -> None:
    """All is installed but a torch, which stays as it was; that it is a name alone, ``sla-doctor`` finds."""
    root, settings, site = image
    python = environment(tmp_path / "venv", site)
    dry = installs_beside(root, python, DRY_RUN="1", **settings)
    assert dry.returncode == 0 and "tensorboard" in dry.stdout, dry.stderr
    assert not list((tmp_path / "venv").rglob("tensorboard*"))
    done = installs_beside(root, python, **settings)
    assert [version_of("torch", python), version_of("tensorboard", python)] == ["2.9.0", VERSIONS["tensorboard"]], (
        done.stderr
    )
    assert "stays: torch 2.9.0\n" in done.stdout and "8 packages were installed" in done.stdout, done.stderr
    assert done.returncode == 1 and "sla-doctor: error: first fault: torch: " in done.stderr


def test_a_recipe_that_replaces_torch_is_found(image: tuple[Path, dict[str, str], Path], tmp_path: Path) -> None:
    """Right in an environment of one's own: pip with what packages ask for, at constraints.txt's versions."""
    root, settings, site = image
    broken = shutil.copytree(root, tmp_path / "broken")
    script = broken / "launch" / "install_beside.py"
    text = script.read_text()
    with_needs = text.replace(
        '["install", *_QUIET, "--no-deps", ', '["install", *_QUIET, "-c", str(ROOT / "constraints.txt"), '
    )
    assert with_needs.count("constraints.txt") == text.count("constraints.txt") + 2
    script.write_text(with_needs)
    python = environment(tmp_path / "venv", site)
    done = installs_beside(broken, python, **settings)
    assert done.returncode == 1, done.stdout + done.stderr
    torch = version_of("torch", python)
    assert torch != "2.9.0"
    assert done.stderr.splitlines() == [f"install-beside: error: torch was to be 2.9.0, and is {torch}"]


def test_an_interpreter_that_cannot_be_used(tmp_path: Path) -> None:
    """One line, status 2."""
    bare = environment(tmp_path / "venv")
    for python, says in (
        ("/no/such/python", "cannot be used: it is not an interpreter that runs; expected Python 3.12 or newer"),
        (str(bare), "has no pip: expected 22.2 or newer"),
    ):
        done = subprocess.run(
            [ROOT / "launch" / "install-beside.sh"],
            env={"PYTHON": python, "PATH": os.defpath},
            capture_output=True,
            text=True,
        )
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith(f"install-beside: error: PYTHON={python} {says}"), line


@pytest.mark.skipif(not SERVING.exists(), reason="no .venv-serving: launch/make-serving-venv.sh makes one")
def test_beside_another_torch(tmp_path: Path) -> None:
    """Beside a real one, of another version than constraints.txt has: it is what it was, and the doctor is content."""
    (serving,) = SERVING.glob("lib/python*/site-packages")
    there = installed([str(serving)])
    left = {"megatron-core", "datasets", "tensorboard"}
    # Most of what it lacks is taken from here, to save the time of installing it.
    rest = {name for name in here().keys() - there.keys() - left if not stays(name)}
    python = environment(tmp_path / "venv", serving, linked(tmp_path / "rest", rest - {"sla-megatron"}))
    before = version_of("torch", python)
    assert before == there["torch"].version != here()["torch"].version
    done = installs_beside(copied(tmp_path), python, PIP_NO_COMPILE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert version_of("torch", python) == before
    assert f"{len(left)} packages were installed" in done.stdout
    assert re.search(rf"^ok +torch +{re.escape(before)}", done.stdout, re.MULTILINE)
    assert re.search(r"^ok +packages ", done.stdout, re.MULTILINE)


# The Dockerfile, which no test here can build


def test_the_dockerfile_names_what_there_is() -> None:
    """Each instruction is Docker's own, the base is an argument, and what is not sent to the build is not copied."""
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    assert [line.split()[0] for line in lines] == ["ARG", "FROM", "WORKDIR", *["COPY"] * 4, "RUN"]
    assert lines[0].startswith("ARG BASE=") and lines[1] == "FROM ${BASE}"
    sent = set((ROOT / "launch" / "Dockerfile.dockerignore").read_text().split("*\n", 1)[1].split())
    copied = {word for line in lines if line.startswith("COPY") for word in shlex.split(line)[1:-1]}
    assert {f"!{name}" for name in copied} == {name for name in sent if name.startswith("!")}
    # What keeps the image's own is the tested script, and no pip beside it.
    assert [line for line in lines if "pip" in line or "constraints" in line] == [
        "COPY setup.py README.md pyproject.toml constraints.txt ./"
    ]
