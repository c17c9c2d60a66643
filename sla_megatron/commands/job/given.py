"""What a command line gives a flag, as argparse reads it: the last time counts.  What is not asked is not parsed."""

from __future__ import annotations

from collections.abc import Sequence


def values(flags: Sequence[str], name: str) -> list[str] | None:
    """The words that the last ``name`` among ``flags`` has, of any number; ``None`` where it is not given."""
    found = None
    for at, word in enumerate(flags):
        if word == name:
            rest = flags[at + 1 :]
            end = next((number for number, value in enumerate(rest) if value.startswith("--")), len(rest))
            found = list(rest[:end])
        elif word.startswith(f"{name}="):
            found = [word.partition("=")[2]]
    return found
