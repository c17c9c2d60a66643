"""What a user sees when a flag, or a combination of flags, cannot be accepted."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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


#: Whose errors these are where no command says so: of a training run, by our entry point or by a user's own script.
TRAINING = "sla-megatron"


class StartError(Exception):
    """A run or a command cannot start or go on; the message is all that its user needs to know, in one line."""

    @property
    def reason(self) -> str:
        """The message without a program's name, to be shown under another's."""
        return str(self)


class FlagError(StartError):
    """A flag whose value cannot be accepted: one line that names flag, value and what would be accepted.

    Not a ``ValueError``: argparse turns those, in a flag's ``type``, into words that do not say what is accepted.
    """

    def __init__(self, flag: str, value: object, accepted: str) -> None:
        self.flag, self.value, self.accepted = flag, value, accepted
        super().__init__(f"{TRAINING}: error: {self.reason}")

    @property
    def reason(self) -> str:
        shown = " ".join(map(str, self.value)) if isinstance(self.value, list | tuple) else self.value
        given = "without a value" if shown in ("", None) else shown
        return f"{self.flag} {given}: expected {self.accepted}"


def refuse(args: Namespace, refusals: Iterable[Refusal]) -> None:
    """Raise :class:`FlagError` for the first option that is set to something that cannot be accepted."""
    for name, fine, accepted in refusals:
        value = getattr(args, name, None)
        if value not in fine:
            raise FlagError(flag_of(name), value, accepted)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def last_line(error: BaseException) -> str:
    """The last line of an error's text, which in a traceback is what went wrong; or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


_command: ContextVar[str | None] = ContextVar("sla_command", default=None)


@contextmanager
def one_line_errors(command: str = TRAINING, all_ranks: bool = False) -> Iterator[None]:
    """Turn a :class:`StartError` inside the block into its one line on stderr, and exit status 2.

    Within another such block the outer one does so: an error carries the name of the command that its user called.

    Args:
        command: that name.
        all_ranks: whether each process says it, or the first of a job's ranks alone.
    """
    if _command.get() is not None:
        yield
        return
    token = _command.set(command)
    try:
        yield
    except StartError as error:
        if all_ranks or os.environ.get("RANK", "0") == "0":
            print(f"{command}: error: {error.reason}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        _command.reset(token)
