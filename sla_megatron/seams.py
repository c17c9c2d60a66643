"""How this project touches code that is not its own.

Every upstream name that is replaced, here or in the CPU backend, is a :class:`Seam`: a dotted target, a reason, and
where it matters the parameter names upstream is expected to have.  :func:`replaced` installs a list of seams for the
length of a ``with`` block and puts every original back on leaving.  A missing target or a changed signature raises:
replacing a name that upstream no longer has would silently do nothing.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: The megatron-core releases that every seam was read against and tested with.
SUPPORTED_MEGATRON = "0.19"

_MISSING = object()


class SeamError(RuntimeError):
    """Upstream does not look as this project expects."""


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


def require_parameters(function: Any, expected: Sequence[str], label: str) -> None:
    """Raise :class:`SeamError` unless ``function`` has exactly the parameters ``expected``, in that order."""
    found = tuple(inspect.signature(function).parameters)
    if found != tuple(expected):
        raise SeamError(f"{label} has parameters {found}, expected {tuple(expected)}")


def require_megatron() -> str:
    """The installed megatron-core version; raises :class:`SeamError` if it is not one this project was read against."""
    try:
        found = version("megatron-core")
    except PackageNotFoundError as error:
        raise SeamError("megatron-core is not installed: pip install 'megatron-core[training]==0.19.*'") from error
    if found.split(".")[:2] != SUPPORTED_MEGATRON.split("."):
        raise SeamError(f"megatron-core {found} is installed, sla-megatron supports {SUPPORTED_MEGATRON}.x")
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
