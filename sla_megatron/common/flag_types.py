"""What argparse converts the values of our commands' flags with; a bad one is a :class:`FlagError`, one line."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import NoReturn

from .errors import FlagError, StartError

#: A missing value reaches the type function, whose error says what is accepted; argparse's own does not.
WITH_VALUE = {"nargs": "?", "const": ""}

_UNKNOWN = "unrecognized arguments: "

#: argparse's names of types -> what they accept.
_TYPES = {"int": "an integer", "float": "a number"}

#: More than any of these flags means, and less than infinity.
_MOST = 1e18


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {refusal(self, message).reason}\n")


def refusal(parser: argparse.ArgumentParser, message: str) -> StartError:
    """What argparse says of a bad command line, as flag, value and what is accepted; of an unknown flag, those like it.

    Args:
        parser: knows the flags.
        message: as argparse gives it to ``ArgumentParser.error``.
    """
    if message.startswith(_UNKNOWN):
        return unknown_flag(message.removeprefix(_UNKNOWN).split(), known_flags(parser))
    named = re.fullmatch(r"argument (?P<flag>[^\s:/]+)\S*: (?P<complaint>.*)", message, re.DOTALL)
    if named is None:
        return StartError(message)
    flag, complaint = named["flag"], named["complaint"]
    if choice := re.fullmatch(r"invalid choice: (?P<value>.*) \(choose from (?P<choices>.*)\)", complaint, re.DOTALL):
        return FlagError(flag, _unquoted(choice["value"]), f"one of {choice['choices'].replace(chr(39), '')}")
    if typed := re.fullmatch(r"invalid (?P<type>\w+) value: (?P<value>.*)", complaint, re.DOTALL):
        return FlagError(flag, _unquoted(typed["value"]), _TYPES.get(typed["type"], f"a value of type {typed['type']}"))
    if checked := re.fullmatch(r"(?P<value>.*): expected (?P<accepted>.*)", complaint, re.DOTALL):
        return FlagError(flag, checked["value"], checked["accepted"])
    if complaint.startswith("expected "):
        return FlagError(flag, None, complaint.removeprefix("expected ").replace("argument", "value"))
    return StartError(f"{flag}: {complaint}" if flag.startswith("-") else complaint)


def unknown_flag(words: Sequence[str], known: Iterable[str]) -> StartError:
    """The error for words of a command line that nothing takes: the first flag among them, and those most like it."""
    at = next((number for number, word in enumerate(words) if word.startswith("-")), None)
    if at is None:
        return StartError(f"{words[0] if words else 'an empty word'}: expected a flag before it")
    flag, _, value = words[at].partition("=")
    values = [value] if value else list(takewhile(lambda word: not word.startswith("-"), words[at + 1 :]))
    like = difflib.get_close_matches(flag, sorted(known), n=3, cutoff=0.7)
    such = f", such as {' or '.join(like)}" if like else ""
    return StartError(f"{' '.join([flag, *values])}: expected a known flag{such}")


def known_flags(parser: argparse.ArgumentParser) -> set[str]:
    """All flags of ``parser`` and of its subcommands."""
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags = flags.union(*(known_flags(command) for command in action.choices.values()))
    return flags


def _unquoted(shown: str) -> str:
    return shown[1:-1] if shown[:1] in ("'", '"') and shown[-1:] == shown[:1] else shown


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
