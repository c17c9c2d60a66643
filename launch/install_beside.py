"""What ``install-beside.sh`` does: this project into an environment whose own torch stays.

Everything is decided before anything is installed; what could not be left alone ends it, a line for each fault.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# For the imports below alone: the checkout's own packages must not be taken for the environment's.
sys.path.insert(0, str(ROOT))
from sla_megatron.common.requirements import (  # noqa: E402
    COMPILED_AGAINST,
    PROJECT,
    Lack,
    Package,
    Version,
    canonicalize_name,
    installed,
    lacks,
    project_requirements,
    stays,
)

sys.path.remove(str(ROOT))

#: ``pip install --report`` came with it.
OLDEST_PIP = (22, 2)


@dataclass(frozen=True)
class Choice:
    """A version that is to be installed, and what it is missing for."""

    version: str
    because: str


#: Names and versions -> the packages, with what they ask for themselves.
Describe = Callable[[Mapping[str, Choice]], Iterable[Package]]


class Refusal(Exception):
    """Why nothing is installed; a line for each reason."""


def say(line: str) -> None:
    print(f"install-beside: {line}", flush=True)


def pins(text: str) -> dict[str, str]:
    """Canonical name -> version of a file such as ``constraints.txt``."""
    lines = (line.partition("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in lines}


def choose(
    packages: Mapping[str, Package], requirements: Iterable[str], pinned: Mapping[str, str], describe: Describe
) -> dict[str, Choice]:
    """By name, what has to be installed so that all requirements are met; what stays is never among it.

    Raises:
        Refusal: if what stays does not do, or ``pinned`` does not have what is missing.
    """
    future, chosen, requirements = dict(packages), {}, list(requirements)
    while True:
        wanted, reasons = {}, []
        for lack in lacks(future, requirements):
            name = _to_install(lack, pinned, {*chosen, *wanted}, reasons)
            if name is not None:
                wanted.setdefault(name, Choice(pinned[name], str(lack)))
        if reasons:
            raise Refusal("\n".join(dict.fromkeys(reasons)))
        if not wanted:
            return chosen
        future |= {package.name: package for package in describe(wanted)}
        chosen |= wanted


def _to_install(lack: Lack, pinned: Mapping[str, str], chosen: set[str], reasons: list[str]) -> str | None:
    """The package whose pinned version meets ``lack``; ``None``, and a reason, if there is none."""
    name = lack.name
    if stays(name) and (lack.found is not None or name not in COMPILED_AGAINST):
        more = ", and is left to the environment" if lack.found is None else ", which stays"
        reasons.append(f"{lack}{more}")
        return None
    if name in pinned and lack.requirement.specifier.contains(pinned[name], prereleases=True):
        return name
    # Its own pinned version goes with the others, where that is newer.
    asks, _, version = lack.by.partition(" ")
    if asks in pinned and asks not in chosen and not stays(asks) and Version(version) < Version(pinned[asks]):
        return asks
    has = f"has {pinned[name]}" if name in pinned else "has none"
    reasons.append(f"{lack}: constraints.txt {has}")
    return None


def complaints(packages: Mapping[str, Package], chosen: Mapping[str, Choice]) -> list[str]:
    """What of the environment asks for a version of a replaced package that it will not have."""
    future = _versions(packages, chosen)
    found = []
    for package in packages.values():
        if package.name not in chosen and package.name != PROJECT:
            asked = lacks(future, package.requires, f"{package.name} {package.version}")
            found += [str(lack) for lack in asked if lack.name in chosen and lack.name in packages]
    return found


def _versions(packages: Mapping[str, Package], chosen: Mapping[str, Choice]) -> dict[str, Package]:
    """What will be there, without what it asks for."""
    versions = {name: package.version for name, package in packages.items()}
    versions |= {name: choice.version for name, choice in chosen.items()}
    return {name: Package(name, version) for name, version in versions.items()}


def pip(*arguments: str, capture: bool = False) -> str:
    """Run this interpreter's pip; what it printed.  Raises :class:`Refusal` with its last line where it fails."""
    # Newer images of NVIDIA's pin every package of theirs in a file that this names; --no-deps leaves them alone.
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE if capture else None, stderr=subprocess.PIPE)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        raise Refusal(f"pip {arguments[0]}: {errors[-1]}")
    return done.stdout.decode() if capture else ""


#: Neither pip's own news nor what root should not do is of use in an image.
_QUIET = ("--quiet", "--disable-pip-version-check", "--root-user-action=ignore")


def described_by_index(wanted: Mapping[str, Choice]) -> list[Package]:
    """The packages as the package index has them; nothing is installed."""
    exact = [f"{name}=={choice.version}" for name, choice in wanted.items()]
    report = pip(
        "install", *_QUIET, "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", *exact, capture=True
    )
    metadata = [item["metadata"] for item in json.loads(report)["install"]]
    return [
        Package(canonicalize_name(each["name"]), each["version"], tuple(each.get("requires_dist", ())))
        for each in metadata
    ]


def installations(packages: Mapping[str, Package], chosen: Mapping[str, Choice]) -> list[list[str]]:
    """The arguments of pip, one list a call: what is chosen, then this project."""
    calls = []
    not_removable = {name for name in chosen if name in packages and not has_record(name)}
    for names, more in ((chosen.keys() - not_removable, []), (not_removable, ["--ignore-installed"])):
        exact = [f"{name}=={chosen[name].version}" for name in sorted(names)]
        if exact:
            calls.append(["install", *_QUIET, "--no-deps", *more, *exact])
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    # Without it pip asks the index for setuptools, which an image mostly has.
    more = [] if lacks(_versions(packages, chosen), build) else ["--no-build-isolation"]
    calls.append(["install", *_QUIET, "--no-deps", *more, "-e", str(ROOT)])
    return calls


def has_record(name: str) -> bool:
    """Whether pip can remove it: a distribution's own packages it cannot, and puts another in front of them."""
    return importlib.metadata.distribution(name).read_text("RECORD") is not None


def require_usable() -> None:
    """Raises :class:`Refusal` where this interpreter cannot be installed into."""
    version = importlib.metadata.version("pip")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_PIP:
        raise Refusal(f"pip is {version}: expected {'.'.join(map(str, OLDEST_PIP))} or newer")
    marker = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    allowed = os.environ.get("PIP_BREAK_SYSTEM_PACKAGES", "0") not in ("", "0", "false")
    if sys.prefix == sys.base_prefix and marker.exists() and not allowed:
        raise Refusal(
            f"{sys.executable} is the system's: expected a venv that sees its packages "
            "(python3 -m venv --system-site-packages), or PIP_BREAK_SYSTEM_PACKAGES=1"
        )


def changes(before: Mapping[str, Package], after: Mapping[str, Package], chosen: Mapping[str, Choice]) -> list[str]:
    """What is another than it was and was not to be, or is not what it was to be."""
    expected, there = _versions(before, chosen), _versions(after, {})
    return [
        f"{name} was to be {_version(expected, name)}, and is {_version(there, name)}"
        for name in sorted((expected.keys() | there.keys()) - {PROJECT})
        if expected.get(name) != there.get(name)
    ]


def _version(packages: Mapping[str, Package], name: str) -> str:
    return packages[name].version if name in packages else "not there"


def show(before: Mapping[str, Package], chosen: Mapping[str, Choice]) -> None:
    """What the environment has, and what will be done."""
    own = [f"{name} {package.version}" for name, package in sorted(before.items()) if stays(name)]
    libraries = [each for each in own if each.startswith(("nvidia-", "cuda-"))]
    more = f", and {len(libraries)} of CUDA's" if libraries else ""
    say(f"stays: {', '.join(each for each in own if each not in libraries)}{more}")
    for name, choice in chosen.items():
        was = f" {before[name].version} ->" if name in before else ""
        say(f"{name}{was} {choice.version}: {choice.because}")
    if not chosen:
        say("nothing is missing")
    for complaint in complaints(before, chosen):
        say(f"warning: {complaint}")


def main() -> int:
    """Install; the exit status: 2 if nothing was done, 1 if what came of it is not as it should be."""
    dry_run = os.environ.get("DRY_RUN", "0") == "1"
    path = [folder for folder in sys.path if folder not in (str(ROOT), str(ROOT / "launch"))]
    requirements = project_requirements(ROOT)
    try:
        require_usable()
        before = installed(path)
        chosen = choose(before, requirements, pins((ROOT / "constraints.txt").read_text()), described_by_index)
    except Refusal as refusal:
        return _end(2, str(refusal).splitlines())
    show(before, chosen)
    try:
        for call in installations(before, chosen):
            say(shlex.join([sys.executable, "-m", "pip", *call]))
            if not dry_run:
                pip(*call)
    except Refusal as refusal:
        return _end(1, str(refusal).splitlines())
    if dry_run:
        return 0
    importlib.invalidate_caches()
    after = installed(path)
    faults = changes(before, after, chosen) + [f"still missing: {lack}" for lack in lacks(after, requirements)]
    if faults:
        return _end(1, faults)
    kept = sum(name not in chosen for name in before)
    command = ["--software", "--device", os.environ.get("DEVICE", "auto")]
    say(f"{len(chosen)} packages were installed, {kept} are what they were; sla-doctor {shlex.join(command)} says:")
    doctor = [sys.executable, "-m", "sla_megatron.commands.doctor.cli", *command]
    return 1 if subprocess.run(doctor, cwd="/").returncode else 0


def _end(status: int, faults: Iterable[str]) -> int:
    for fault in faults:
        print(f"install-beside: error: {fault}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
