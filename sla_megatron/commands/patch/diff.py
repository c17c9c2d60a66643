"""A unified diff of a file, applied to a text or taken back: all of it, or nothing.

Stricter than ``patch`` and ``git apply``, and without them: the lines that a hunk expects must be in the text exactly
once, wherever that is, so that there is nothing to guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


class DiffError(ValueError):
    """The text does not have the lines that the diff expects."""


@dataclass(frozen=True)
class Hunk:
    """Whole lines, each with its line end: what the hunk expects, and what it makes of them."""

    before: str
    after: str

    def reversed(self) -> Hunk:
        """The hunk that takes this one back."""
        return Hunk(self.after, self.before)

    def fits(self, text: str) -> bool:
        """Whether ``text`` holds the expected lines exactly once."""
        return len(self._starts(text)) == 1

    def apply(self, text: str) -> str:
        """``text`` with the hunk applied; it must fit."""
        (start,) = self._starts(text)
        return text[:start] + self.after + text[start + len(self.before) :]

    def _starts(self, text: str) -> list[int]:
        # Looked ahead at, so that places which overlap are counted too.
        return [match.start() for match in re.finditer(f"^(?={re.escape(self.before)})", text, re.MULTILINE)]


@dataclass(frozen=True)
class Diff:
    """``path`` is the file's, relative to the folder that the diff is for."""

    path: str
    hunks: tuple[Hunk, ...]

    @classmethod
    def parse(cls, text: str) -> tuple[Diff, ...]:
        """A diff of one file, or of several one after the other; what stands before ``--- a/`` is its description.

        Raises ``ValueError`` for anything else.
        """
        headers = list(re.finditer(r"^--- a/(\S+)\n\+\+\+ b/\1\n(?=@@ )", text, re.MULTILINE))
        ends = [*(header.start() for header in headers[1:]), len(text)]
        if not headers:
            raise ValueError("not a unified diff of files")
        return tuple(
            cls(header[1], _hunks(text[header.end() : end])) for header, end in zip(headers, ends, strict=True)
        )

    def reversed(self) -> Diff:
        """The diff that takes this one back."""
        return Diff(self.path, tuple(hunk.reversed() for hunk in self.hunks))

    def fits(self, text: str) -> bool:
        """Whether every hunk does."""
        return all(hunk.fits(text) for hunk in self.hunks)

    def apply(self, text: str) -> str:
        """``text`` with the diff applied.  Raises :class:`DiffError`, which quotes the lines that a hunk misses."""
        for hunk in self.hunks:
            if not hunk.fits(text):
                raise DiffError(" then ".join(repr(line) for line in hunk.before.splitlines()))
            text = hunk.apply(text)
        return text


def _hunks(text: str) -> tuple[Hunk, ...]:
    _, *hunks = re.split(r"^@@ -\d+,\d+ \+\d+,\d+ @@.*\n", text, flags=re.MULTILINE)
    return tuple(_hunk(lines.splitlines(keepends=True)) for lines in hunks)


def _hunk(lines: list[str]) -> Hunk:
    unknown = [line for line in lines if line[0] not in " +-"]
    if unknown or not lines:
        raise ValueError(f"not a line of a unified diff: {unknown[:1]}")
    before = "".join(line[1:] for line in lines if line[0] in " -")
    return Hunk(before, "".join(line[1:] for line in lines if line[0] in " +"))
