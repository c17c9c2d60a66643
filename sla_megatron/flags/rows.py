"""Rows of flags that are refused where others are so, for tables of them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..common.errors import FlagError, flag_of


@dataclass(frozen=True)
class Row:
    """A flag whose value must be one of ``fine`` ``when`` the other flags, as they were parsed, are so."""

    name: str
    fine: tuple[Any, ...]
    accepted: str
    when: Callable[[Namespace], Any] = lambda args: True


class _Given:
    """Arguments of which those that this Megatron does not have are ``None``."""

    def __init__(self, args: Namespace) -> None:
        self._args = args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name, None)


def refuse_rows(args: Namespace, rows: Iterable[Row]) -> None:
    """Raise :class:`FlagError` for the first of ``rows`` that holds."""
    given = _Given(args)
    for row in rows:
        value = getattr(given, row.name)
        # Of an enumeration the name is what a user typed.
        value = getattr(value, "name", value)
        if value not in row.fine and row.when(given):
            raise FlagError(flag_of(row.name), value, row.accepted)
