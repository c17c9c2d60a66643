"""What an environment, such as a container's image, must hold beside torch and Megatron: packages, tools, by name."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

from ...common.requirements import Lack, Package, installed, lacks, project_requirements
from . import upstream, versions
from .finding import Doubt, Fault, found
from .report import Report, merge

#: Megatron's own folder of data helpers, which only a checkout compiles itself.
_DATASETS = Path("core/datasets")
_RECIPE = "expected what launch/install-beside.sh would install"


def packages(there: Mapping[str, Package] | None = None) -> str:
    """Every package that this project asks for is there, and new enough; and so are those that they ask for.

    Args:
        there: what is installed, by canonical name; by default what an import would find.
    """
    there = installed() if there is None else there
    missing = lacks(there, project_requirements())
    if "megatron-core" not in there:
        # A checkout on the path is no package; what it is, another line says.
        missing = [lack for lack in missing if lack.name != "megatron-core"]
    if own := [lack for lack in missing if lack.by == "sla-megatron"]:
        raise Fault(f"{_listed(own)}: {_RECIPE}")
    if missing:
        raise Doubt(f"{_listed(missing)}: {_RECIPE}")
    return f"{len(there)} installed; all that is asked for is there"


def _listed(missing: list[Lack], shown: int = 6) -> str:
    more = f", and {len(missing) - shown} more" if len(missing) > shown else ""
    return "; ".join(map(str, missing[:shown])) + more


def tools(device: str, which: Callable[[str], str | None] = shutil.which) -> str:
    """The commands and libraries that a run calls on: what it ends without fails, the rest is a doubt.

    Args:
        device: ``"cuda"``: what runs on a GPU too is examined, whether or not there is one here.
        which: a command's path.
    """
    faults = _faults_of_checkout(which)
    doubts = [] if which("bash") else ["bash: launch/slurm.sbatch starts ranks with it"]
    if device == "cuda":
        faults += _faults_of_triton(which)
        if which("nvidia-smi") is None:
            doubts.append("nvidia-smi: sla-job health calls it, unless HEALTH_CHECK is another")
        if not _loads("libcuda.so.1"):
            doubts.append("libcuda.so.1: the driver's, which a container's runtime brings (apptainer: --nv)")
    if faults:
        raise Fault(f"not found: {'; '.join(faults)}")
    if doubts:
        raise Doubt(f"not found: {'; '.join(doubts)}")
    return "compilers and commands are there" if device == "cuda" else "commands are there"


def _faults_of_triton(which: Callable[[str], str | None]) -> list[str]:
    """Triton compiles a launcher for each of its kernels when it is first used; ours, and Megatron's fused ones."""
    if importlib.util.find_spec("triton") is None:
        return []
    faults = []
    if not os.environ.get("CC") and not which("gcc") and not which("clang"):
        faults.append("gcc or clang (or CC=): Triton compiles the launchers of its kernels")
    # As Triton asks, which installs for no distribution.
    header = Path(sysconfig.get_paths(scheme="posix_prefix")["include"], "Python.h")
    if not header.is_file():
        faults.append(f"{header} (python3-dev): Triton's launchers include it")
    return faults


def _faults_of_checkout(which: Callable[[str], str | None]) -> list[str]:
    """A checkout of Megatron-LM compiles its data helpers at each start, and ends where it cannot; a wheel has them."""
    megatron = importlib.util.find_spec("megatron")
    folders = [] if megatron is None else [Path(folder, _DATASETS) for folder in megatron.submodule_search_locations]
    folder = next((each for each in folders if each.is_dir()), None)
    if folder is None or not (folder / "Makefile").is_file():
        return []
    why = f"{folder} is compiled at each start"
    faults = [] if which("make") else [f"make: {why}"]
    if not list(folder.glob("helpers_cpp.*.so")):
        compiler = os.environ.get("CXX") or "g++"
        faults += [f"{name}: {why}" for name in (compiler, "python3-config") if not which(name)]
        if importlib.util.find_spec("pybind11") is None:
            faults.append(f"pybind11, a package: {why}")
    return faults


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def torch_device(requested: str) -> str:
    """``"cuda"`` where the environment is for GPUs: ``--device`` says so, or torch is built for them."""
    if requested != "auto":
        return requested
    import torch

    return "cpu" if torch.version.cuda is None else "cuda"


def examine(requested: str) -> int:
    """All of it, a line each, without a job's flags and without a GPU; the exit status."""
    report = Report()
    device: list[str] = []

    def torch_versions() -> str:
        try:
            device.append(torch_device(requested))
        except ImportError as error:
            raise Fault(f"not there, or not to be imported: {error}") from error
        return versions.torch_versions(device[0])

    for check, look in (
        ("python", versions.python_version),
        ("torch", torch_versions),
        ("megatron", upstream.megatron_release),
        ("packages", packages),
        ("kernels", lambda: versions.kernels(device[0] if device else "cpu")),
        ("tools", lambda: tools(device[0] if device else "cpu")),
    ):
        report.add(merge({"here": found(check, look)}))
    return report.conclude(None)
