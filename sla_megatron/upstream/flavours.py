"""Which line of Megatron's development a folder holds: what its sources have, not what its version says alone.

The branch dev says a version of main's, and has other functions; so may any commit in between.  Sources are read as
text: nothing of Megatron is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .seams import SeamError

#: What this project relies on and lines of development differ in: a name, and the file below ``megatron/core`` that has
#: it or has not.
MARKS = {
    "_build_default_pg_collection": "pipeline_parallel/schedules.py",
    "head_wise_gate": "transformer/attention.py",
}


@dataclass(frozen=True)
class Flavour:
    """One line of development.

    Attributes:
        name: in messages, and in the table of patches.
        minor: the minor version that it says.
        marks: which of :data:`MARKS` it has.
        checked: what every seam was read against and tested with.
    """

    name: str
    minor: str
    marks: frozenset[str]
    checked: str

    def described(self, version: str) -> str:
        """``version`` as it is said, and the line's name where that does not say which it is: ``0.19.0, dev``."""
        return version if minor_of(version) == self.name else f"{version}, {self.name}"

    def __str__(self) -> str:
        return f"{self.name}{'.x' if self.name == self.minor else ''} ({self.checked})"


_MAIN = frozenset({"_build_default_pg_collection"})

FLAVOURS = (
    Flavour("0.19", "0.19", _MAIN, "0.19.2 from the package index, core_v0.19.0"),
    Flavour("0.20", "0.20", _MAIN, "development: main at d98e8a64 of 2026-08-22"),
    Flavour("dev", "0.19", frozenset({"head_wise_gate"}), "d48bd6be of 2026-08-21, which says 0.19.0"),
)

#: As one line, for messages.
SUPPORTED = "; ".join(map(str, FLAVOURS))


def flavour_of(version: str | None, core: Path) -> Flavour:
    """The line of ``core``, a folder ``megatron/core`` that says ``version``.

    Raises:
        SeamError: for a version that no line has, or where its sources are none's: one line, without the folder's name.
        OSError: where a source is not there.
    """
    said = [flavour for flavour in FLAVOURS if version is not None and flavour.minor == minor_of(version)]
    if not said:
        raise SeamError(f"Megatron {version or 'of no known version'}, supported: {SUPPORTED}")
    found = frozenset(name for name, file in MARKS.items() if name in (core / file).read_text(errors="replace"))
    for flavour in said:
        if flavour.marks == found:
            return flavour
    has = [f"{file} {'has' if name in found else 'lacks'} {name}" for name, file in MARKS.items()]
    raise SeamError(f"Megatron {version}, but {' and '.join(has)}, supported: {SUPPORTED}")


def minor_of(version: str) -> str:
    """``"0.19.2"`` -> ``"0.19"``."""
    return ".".join(version.split(".")[:2])
