"""What argparse converts the values of our commands' flags with; a bad one is a :class:`FlagError`, one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from .errors import FlagError

#: A missing value reaches the type function, whose error is one line; argparse's own is Megatron's usage text.
WITH_VALUE = {"nargs": "?", "const": ""}

#: More than any of these flags means, and less than infinity.
_MOST = 1e18


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(
    flag: str, convert: type, accepted: str, least: float | None = None, below: float = _MOST
) -> Callable[[str], float]:
    """A number of ``flag``: ``least`` or more (None: more than 0), and less than ``below``."""

    def read(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            raise FlagError(flag, text, accepted) from None
        # Not a number compares with nothing.
        if not ((value > 0 if least is None else value >= least) and value < below):
            raise FlagError(flag, text, accepted)
        return value

    return read


def count(flag: str, least: int = 1) -> Callable[[str], float]:
    """An integer of ``least`` or more."""
    return number(flag, int, f"an integer of {least} or more", least)


def file_name(flag: str) -> Callable[[str], str]:
    """A name that is not empty."""

    def read(text: str) -> str:
        if not text:
            raise FlagError(flag, text, "a file name")
        return text

    return read
