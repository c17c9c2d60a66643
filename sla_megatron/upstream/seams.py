"""How this project touches code that is not its own.

Every upstream name that is replaced, here or in the CPU backend, is a :class:`Seam`: a dotted target, a reason, and
where it matters the parameter names upstream is expected to have.  :func:`replaced` installs a list of seams for the
length of a ``with`` block and puts every original back on leaving.  A name that is overridden in a subclass, or called,
and must be as it was when it was read, is a :class:`Reliance`.  ``registry.py`` lists both.

A missing target or a changed signature raises: replacing a name that upstream no longer has would silently do nothing.
:func:`require_megatron` raises for a Megatron of a version that none of this was checked with.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import StartError

#: Minor version -> what every seam was read against and tested with.
CHECKED_WITH = {
    "0.19": "0.19.2 from the package index, core_v0.19.0",
    "0.20": "development: main at d98e8a64 of 2026-08-22",
}

#: As one line, for messages.
SUPPORTED = "; ".join(f"{minor}.x ({checked})" for minor, checked in CHECKED_WITH.items())

#: Where Megatron keeps its version, in a checkout.
VERSION_FILE = Path("megatron/core/package_info.py")

_MISSING = object()


class SeamError(RuntimeError):
    """Upstream does not look as this project expects."""


class MegatronVersionError(SeamError, StartError):
    """There is no Megatron, or one that this project was not checked with: one line."""


@dataclass(frozen=True)
class Seam:
    """One upstream name and what stands in for it.

    ``target`` is ``"package.module:Class.attribute"``; ``parameters``, where given, are the names of the upstream
    callable's parameters, in order, as the stand-in assumes them.
    """

    target: str
    stand_in: Any
    reason: str
    parameters: tuple[str, ...] | None = None

    def resolve(self) -> tuple[Any, str]:
        """The object that owns the name, and the name."""
        module_name, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        try:
            owner = importlib.import_module(module_name)
            for part in owners:
                owner = getattr(owner, part)
            original = getattr(owner, name)
        except (ImportError, AttributeError) as error:
            raise SeamError(f"{self.target} does not exist ({error}); needed because: {self.reason}") from error
        if self.parameters is not None:
            require_parameters(original, self.parameters, self.target)
        return owner, name


@dataclass(frozen=True)
class Reliance:
    """One upstream name that stays as it is, and that this project overrides or calls; fields as in :class:`Seam`."""

    target: str
    reason: str
    parameters: tuple[str, ...] | None = None

    def require(self) -> None:
        """Raise :class:`SeamError` unless upstream has the name, with these parameters."""
        Seam(self.target, None, self.reason, self.parameters).resolve()


def require_parameters(function: Any, expected: Sequence[str], label: str) -> None:
    """Raise :class:`SeamError` unless ``function`` has exactly the parameters ``expected``, in that order."""
    found = tuple(inspect.signature(function).parameters)
    if found != tuple(expected):
        raise SeamError(f"{label} has parameters {found}, expected {tuple(expected)}")


def version_in(package_info: Path) -> str | None:
    """Such as ``"0.19.2"``, of Megatron's ``package_info.py``; ``None`` if it does not say.  Raises ``OSError``."""
    found: dict[str, object] = {}
    try:
        statements = ast.parse(package_info.read_bytes()).body
    except (SyntaxError, ValueError):
        return None
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            found |= {target.id: statement.value.value for target in statement.targets if isinstance(target, ast.Name)}
    numbers = [found.get(name) for name in ("MAJOR", "MINOR", "PATCH")]
    if not all(isinstance(number, int) for number in numbers):
        return None
    return ".".join(map(str, numbers)) + str(found.get("PRE_RELEASE") or "")


def minor_of(version: str) -> str:
    """``"0.19.2"`` -> ``"0.19"``."""
    return ".".join(version.split(".")[:2])


def require_megatron() -> str:
    """The version of the Megatron that will be imported.

    Raises:
        MegatronVersionError: if there is none, or one that this project was not checked with.
    """
    try:
        core = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        core = None
    if core is None or core.origin is None:
        raise MegatronVersionError("Megatron is not installed: pip install 'megatron-core[training]==0.19.*'")
    package_info = Path(core.origin).with_name(VERSION_FILE.name)
    try:
        found = version_in(package_info)
    except OSError as error:
        raise MegatronVersionError(f"{package_info}: cannot be read ({error.strerror})") from error
    if found is None or minor_of(found) not in CHECKED_WITH:
        raise MegatronVersionError(f"{core.origin}: Megatron {found or 'of no known version'}, supported: {SUPPORTED}")
    return found


def install(seams: Sequence[Seam]) -> None:
    """Install ``seams`` for the rest of the process; nothing where they are.  All are checked before the first is."""
    for seam, (owner, name) in [(seam, seam.resolve()) for seam in seams]:
        setattr(owner, name, seam.stand_in)


@contextmanager
def replaced(seams: Sequence[Seam]) -> Iterator[None]:
    """Install ``seams`` for the length of the block.  All are checked before the first is installed."""
    places = [seam.resolve() for seam in seams]
    originals: list[tuple[Any, str, Any]] = []
    try:
        for seam, (owner, name) in zip(seams, places, strict=True):
            # An inherited attribute is put back by deleting ours, not by copying it into the subclass.
            original = vars(owner).get(name, _MISSING) if isinstance(owner, type) else getattr(owner, name)
            setattr(owner, name, seam.stand_in)
            originals.append((owner, name, original))
        yield
    finally:
        for owner, name, original in reversed(originals):
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
