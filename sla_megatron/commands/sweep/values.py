"""Values of a grid's file: counts, shares, lists, mappings of known keys; each refused with its key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...attention.sla_config import of_share
from .errors import GridError


def count(key: str, value: Any, accepted: str) -> int:
    """1 or more; ``2e6`` is one too."""
    if isinstance(value, float) and value.is_integer() and value > 1:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise GridError(key, value, accepted)
    return value


def share(key: str, value: Any, whole: int) -> int:
    """A count as it is, a share of ``whole`` rounded as the flags' defaults are, and at least 1."""
    if isinstance(value, float) and 0 < value <= 1:
        return of_share(value, whole)
    return count(key, value, "a count of 1 or more, or a share such as 0.75")


def listed(key: str, value: Any) -> list[Any]:
    """``value``, or a list of it alone; none twice."""
    values = value if isinstance(value, list) else [value]
    if value is None or not values:
        raise GridError(key, None, "a value, or a list of them")
    for one in values:
        if values.count(one) > 1:
            raise GridError(key, values, f"{one} once")
    return values


def chosen(key: str, value: Any, choices: Collection[str]) -> list[str]:
    """One of ``choices``, or a list of them."""
    values = listed(key, value)
    for one in values:
        if one not in choices:
            raise GridError(key, one, " or ".join(choices))
    return values


def known(mapping: Mapping[str, Any], keys: Collection[str], prefix: str) -> None:
    """Raise :class:`GridError` for a key that is none of ``keys``."""
    for key in mapping:
        if key not in keys:
            raise GridError(f"{prefix}{key}", mapping[key], f"one of the keys {', '.join(keys)}")
