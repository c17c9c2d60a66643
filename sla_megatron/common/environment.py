"""Where a measurement was made: commit, processor, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]

#: Recorded where they are installed.
PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "apex",
    "numpy",
    "sentencepiece",
    "tokenizers",
)


def commit(checkout: Path = _ROOT) -> str:
    """What is checked out in ``checkout``, with ``+changes`` where files differ from it; ``unknown`` without git."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
        # A result that takes the place of an earlier one changes no measurement.
        measured = ["sla_megatron", "benchmarks", "examples", ":(exclude)benchmarks/results"]
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *measured], cwd=checkout)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()[:12] + ("+changes" if changes.returncode else "")


def installed_version(distribution: str, module: str) -> str | None:
    """The version of ``module``, or that it is unknown; ``None`` if the module is not there."""
    if find_spec(module) is None:
        return None
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on: processor, threads, versions."""
    import torch

    found: dict[str, Any] = {"device": device, "processor": processor(), "cores": os.cpu_count()}
    found["threads"] = torch.get_num_threads()
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    # A source version is not of interest.
    found["torch"] = torch.__version__
    return found


def processor() -> str:
    """The processor's name, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
