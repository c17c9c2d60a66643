"""What one check found on one node."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

OK, SKIP, WARN, FAIL = "ok", "skip", "warn", "FAIL"


class Fault(Exception):
    """What keeps the job from running, as one line: what was found, and what was expected."""


class Skipped(Exception):
    """Why a check does not apply, as one line."""


class Doubt(Exception):
    """What need not keep the job from running, but is hardly meant, as one line."""


@dataclass(frozen=True)
class Finding:
    """One line: the name of the check, how it went, and what was found."""

    check: str
    status: str
    text: str


def found(check: str, examine: Callable[..., str], *arguments: Any) -> Finding:
    """What ``examine(*arguments)`` finds: its text where all is well, else what it raises, whatever that is."""
    try:
        return Finding(check, OK, examine(*arguments))
    except Skipped as reason:
        return Finding(check, SKIP, str(reason))
    except Doubt as reason:
        return Finding(check, WARN, str(reason))
    except Fault as reason:
        return Finding(check, FAIL, str(reason))
    except Exception as error:
        return Finding(check, FAIL, error_line(error))


def error_line(error: BaseException, limit: int = 300) -> str:
    """Kind and message of ``error`` as one line of at most ``limit`` characters."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def as_text(findings: Iterable[Finding]) -> str:
    """``findings`` as text that goes through a store."""
    return json.dumps([asdict(finding) for finding in findings])


def from_text(text: str) -> list[Finding]:
    """What :func:`as_text` wrote."""
    return [Finding(**fields) for fields in json.loads(text)]
