"""What a user sees when a flag, or a combination of flags, cannot be accepted."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

#: Values of a Megatron option that is off.
OFF = (None, False, 0)

#: Attribute of the parsed arguments, the values that are fine, and what the message says is accepted.
Refusal = tuple[str, tuple[Any, ...], str]

# Where Megatron's flag is not named as the attribute is.
_FLAGS = {"fp8": "--fp8-format", "fp4": "--fp4-format"}


def flag_of(name: str) -> str:
    """``sla_layers`` -> ``--sla-layers``."""
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


class StartError(Exception):
    """A run cannot start; the message is all that its user needs to know, in one line."""


class FlagError(StartError):
    """A flag whose value cannot be accepted: one line that names flag, value and what would be accepted.

    Not a ``ValueError``: argparse turns those, in a flag's ``type``, into Megatron's usage text of two thousand lines.
    """

    def __init__(self, flag: str, value: object, accepted: str) -> None:
        self.flag, self.value, self.accepted = flag, value, accepted
        shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
        given = "without a value" if shown in ("", None) else shown
        super().__init__(f"sla-megatron: error: {flag} {given}: expected {accepted}")


def refuse(args: Namespace, refusals: Iterable[Refusal]) -> None:
    """Raise :class:`FlagError` for the first option that is set to something that cannot be accepted."""
    for name, fine, accepted in refusals:
        value = getattr(args, name, None)
        if value not in fine:
            raise FlagError(flag_of(name), value, accepted)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a :class:`StartError` inside the block into its one line, on rank 0's stderr, and exit status 2."""
    try:
        yield
    except StartError as error:
        if os.environ.get("RANK", "0") == "0":
            text = str(error)
            print(text if text.startswith("sla-") else f"sla-megatron: error: {text}", file=sys.stderr, flush=True)
        sys.exit(2)
