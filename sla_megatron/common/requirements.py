"""What this project asks of an environment's packages, and what of it is missing; needs neither torch nor Megatron."""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

try:
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version
except ImportError:  # A bare image has pip's copy of it alone.
    from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
    from pip._vendor.packaging.utils import canonicalize_name
    from pip._vendor.packaging.version import InvalidVersion, Version

#: This project's name as a package.
PROJECT = "sla-megatron"

#: Built for a machine's CUDA, and for each other: an image's own are never replaced, and never installed.
IMAGES_OWN = ("torch", "torchvision", "torchaudio", "triton", "pytorch-triton", "transformer-engine*", "apex")
IMAGES_OWN += ("flash-attn*", "nvidia-*", "cuda-*")

#: What those were compiled against: never replaced either.
COMPILED_AGAINST = ("numpy",)


@dataclass(frozen=True)
class Package:
    """One installed package; ``requires`` are its requirements as its metadata says them."""

    name: str
    version: str
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lack:
    """A requirement that is not met.

    Attributes:
        requirement: what is asked for; its name is canonical.
        by: who asks.
        found: the version that is there, ``None`` if there is none.
    """

    requirement: Requirement
    by: str
    found: str | None

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    def __str__(self) -> str:
        asked = f"{self.by} asks for {self.name}{self.requirement.specifier}"
        return asked if self.found is None else f"{asked} and finds {self.found}"


def stays(name: str) -> bool:
    """Whether the package is an image's own, or what those were compiled against."""
    return any(fnmatchcase(name, pattern) for pattern in (*IMAGES_OWN, *COMPILED_AGAINST))


def installed(path: Sequence[str] | None = None) -> dict[str, Package]:
    """Canonical name -> the package that an import would find, on ``sys.path`` or on ``path``."""
    found: dict[str, Package] = {}
    arguments = {} if path is None else {"path": list(path)}
    for distribution in importlib.metadata.distributions(**arguments):
        name = distribution.metadata["Name"]
        # What a removal left behind has no name.
        if name is not None and (name := canonicalize_name(name)) not in found:
            found[name] = Package(name, distribution.version, tuple(distribution.requires or ()))
    return found


def project_requirements(root: Path = Path(__file__).parents[2]) -> list[str]:
    """This project's own: of ``setup.py`` in a checkout, else of what is installed; none if neither is there."""
    setup = root / "setup.py"
    if not setup.is_file():
        try:
            return importlib.metadata.requires(PROJECT) or []
        except importlib.metadata.PackageNotFoundError:
            return []
    for node in ast.parse(setup.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "INSTALL_REQUIRES":
            return ast.literal_eval(node.value)
    return []


def lacks(packages: Mapping[str, Package], requirements: Iterable[str], by: str = PROJECT) -> list[Lack]:
    """What of ``requirements``, and of all that those ask for in turn, ``packages`` does not meet.

    An image's own packages are taken as they are: what they ask for is not looked at.
    """
    found: dict[tuple[str, str, str], Lack] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(by, requirement) for requirement in _applying(requirements, frozenset())]
    while waiting:
        asks, requirement = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        package = packages.get(name)
        if package is None or not _meets(package, requirement):
            lack = Lack(requirement, asks, package and package.version)
            found.setdefault((name, asks, str(requirement.specifier)), lack)
        extras = frozenset(map(canonicalize_name, requirement.extras))
        if package is None or stays(name) or (name, extras) in seen:
            continue
        seen.add((name, extras))
        waiting += [(f"{name} {package.version}", each) for each in _applying(package.requires, extras)]
    return list(found.values())


def _meets(package: Package, requirement: Requirement) -> bool:
    try:
        version = Version(package.version)
    except InvalidVersion:
        # What somebody built for himself, and knows.
        return True
    # NVIDIA's images have 2.9.0a0+...nv25.09, which is 2.9.0 in all but its name.
    compared = version.base_version if stays(package.name) else str(version)
    return requirement.specifier.contains(compared, prereleases=True)


def _applying(requirements: Iterable[str], extras: frozenset[str]) -> Iterator[Requirement]:
    """Those that this interpreter and these extras make apply."""
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            # Of an older setuptools, which let it pass.
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement
