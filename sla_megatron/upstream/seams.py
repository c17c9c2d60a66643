"""How this project touches code that is not its own.

Every upstream name that is touched is declared where it is used, as a :class:`Reliance`: a dotted target, a reason, and
where it matters the parameter names, or the very source, that upstream is expected to have.  One that something else
stands for is a :class:`Seam`: :func:`replaced` installs a list of them for the length of a ``with`` block and puts
every original back on leaving.  One that is wrapped for the rest of the process is a :class:`Wrapping`.

What versions of Megatron have in different places, or in different forms, is declared once for each of them, as
:class:`OneOf`: the first that fits counts.

A missing target, a changed signature or a changed source raises: replacing a name that upstream no longer has would
silently do nothing.  ``sla-patch registry`` lists every declaration.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

_MISSING = object()

#: Target -> our wrapper, of every name that was wrapped in this process.
_wrappers: dict[str, Any] = {}


class SeamError(RuntimeError):
    """Upstream does not look as this project expects."""


@dataclass(frozen=True)
class Reliance:
    """One upstream name that this project overrides, calls or restates, and that must be as it was when it was read.

    Args:
        target: ``"package.module:Class.attribute"``.
        reason: why it is touched.
        parameters: names of the callable's parameters, in order; ``None``: none are assumed.
        sources: hash of the callable's source (:func:`source_hash`) -> the versions of Megatron in which that was read;
            for what is restated here, where a step that upstream adds would be lost in silence.
    """

    target: str
    reason: str
    parameters: tuple[str, ...] | None = None
    sources: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def resolve(self) -> tuple[Any, str]:
        """The object that owns the name, and the name.  Raises :class:`SeamError` unless it is as expected."""
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
        if self.sources and (found := source_hash(original)) not in self.sources:
            raise SeamError(
                f"{self.target} is not as it was read in Megatron {' or '.join(self.sources.values())} (its source has "
                f"the hash {found}); it is restated here because: {self.reason}"
            )
        return owner, name

    def require(self) -> None:
        """Raise :class:`SeamError` unless the name is as expected."""
        self.resolve()

    def fitting(self) -> Reliance:
        """This one.  Raises :class:`SeamError` unless the name is as expected."""
        self.require()
        return self


@dataclass(frozen=True)
class Seam(Reliance):
    """A name with something that stands in for it: ``stand_in``."""

    stand_in: Any = field(kw_only=True)


@dataclass(frozen=True)
class Wrapping(Reliance):
    """A function that is wrapped for the rest of the process: ``wrap`` makes the wrapper of what is there.

    What is there may be somebody's wrapper that takes anything; of that no parameters can be expected.
    """

    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = field(kw_only=True)

    def resolve(self) -> tuple[Any, str]:
        owner, name = Reliance(self.target, self.reason, sources=self.sources).resolve()
        there = getattr(owner, name)
        kinds = {parameter.kind for parameter in inspect.signature(there).parameters.values()}
        if self.parameters is not None and kinds != {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            require_parameters(there, self.parameters, self.target)
        return owner, name


@dataclass(frozen=True)
class OneOf:
    """One name, or what has taken its place, as the versions of Megatron have it: ``declarations``, one for each form.

    Stands where a single declaration does.  Among seams a form that is only relied on is checked, and nothing is
    replaced.
    """

    declarations: tuple[Reliance, ...]

    def __init__(self, *declarations: Reliance) -> None:
        object.__setattr__(self, "declarations", declarations)

    def fitting(self) -> Reliance:
        """The first that fits.  Raises one :class:`SeamError`, with what each of them misses, where none does."""
        misses: dict[str, None] = {}
        for declaration in self.declarations:
            try:
                return declaration.fitting()
            except SeamError as error:
                misses[str(error)] = None
        raise SeamError("; and ".join(misses))

    def resolve(self) -> tuple[Any, str]:
        """Of the one that fits: the object that owns the name, and the name."""
        return self.fitting().resolve()

    def require(self) -> None:
        """Raise :class:`SeamError` unless one fits."""
        self.fitting()


def require_parameters(function: Any, expected: Sequence[str], label: str) -> None:
    """Raise :class:`SeamError` unless ``function`` has exactly the parameters ``expected``, in that order."""
    found = tuple(inspect.signature(function).parameters)
    if found != tuple(expected):
        raise SeamError(f"{label} has parameters {found}, expected {tuple(expected)}")


# A seam may be installed, and so resolved, in every microbatch.
@cache
def source_hash(function: Any) -> str:
    """Of the function's source text, the first 16 digits; of one that somebody wrapped, of what is inside.

    Raises :class:`SeamError` where Python has no source.
    """
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError) as error:
        raise SeamError(f"{function} has no source to compare ({error})") from error
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def wrap_once(wrappings: Sequence[Wrapping | OneOf]) -> None:
    """Wrap what is there now, for the rest of the process; nothing where our wrapper is there, or inside another's.

    All are checked before the first is wrapped.  Raises :class:`SeamError` if upstream changed.
    """
    fitting = [wrapping.fitting() for wrapping in wrappings]
    for wrapping, (owner, name) in [(wrapping, wrapping.resolve()) for wrapping in fitting]:
        there, ours = getattr(owner, name), _wrappers.get(wrapping.target)
        # What is wrapped as functools does it can be looked into; what cannot, and came after ours, holds ours.
        inside = [there]
        while hasattr(inside[-1], "__wrapped__"):
            inside.append(inside[-1].__wrapped__)
        if ours is None or (ours not in inside and ours.__wrapped__ in inside):
            _wrappers[wrapping.target] = wrapping.wrap(there)
            setattr(owner, name, _wrappers[wrapping.target])


@contextmanager
def replaced(seams: Sequence[Seam | OneOf]) -> Iterator[None]:
    """Install ``seams`` for the length of the block.  All are checked before the first is installed."""
    fitting = [seam.fitting() for seam in seams]
    places = [(seam, *seam.resolve()) for seam in fitting if isinstance(seam, Seam)]
    originals: list[tuple[Any, str, Any]] = []
    try:
        for seam, owner, name in places:
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
