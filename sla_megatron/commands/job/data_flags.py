"""Where Megatron's flags name data: prefixes of .bin and .idx, with weights or without, or files that list them.

As ``get_blend_and_blend_per_split`` (megatron/training/utils) and ``get_blend_from_list``
(megatron/core/datasets/utils) read them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .flags import JobError
from .given import values

#: Of prefixes, and of files that have them.
PATHS = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path")
LIST, LISTS, COUNTS = FILES = ("--data-args-path", "--per-split-data-args-path", "--per-dataset-sequences-path")


def names_data(flags: Sequence[str]) -> bool:
    """Whether any of ``flags`` names data."""
    return any(values(flags, flag) for flag in (*PATHS, LIST, LISTS))


def list_files(flags: Sequence[str]) -> dict[str, str]:
    """Flag -> file, of those among ``flags`` that name a file with prefixes in it."""
    found = {flag: values(flags, flag) for flag in FILES}
    return {flag: given[0] for flag, given in found.items() if given}


def prefixes(flags: Sequence[str]) -> list[str]:
    """All that ``flags`` name, each once; those in object storage (``s3://``) too.

    Raises:
        JobError: for a file of prefixes that cannot be read.
    """
    found: dict[str, None] = {}

    def note(prefix: str) -> str:
        found[prefix] = None
        return prefix

    for flag in PATHS:
        with_prefixes(values(flags, flag) or [], note)
    for flag, file in list_files(flags).items():
        rewritten(flag, file, note)
    return list(found)


def with_prefixes(words: Sequence[str], change: Callable[[str], str]) -> list[str]:
    """A blend's ``words`` with every prefix changed; weights, one before each, stay."""
    weighted = len(words) % 2 == 0 and all(_is_number(word) for word in words[::2])
    return [word if weighted and not at % 2 else change(word) for at, word in enumerate(words)]


def rewritten(flag: str, file: str, change: Callable[[str], str]) -> str:
    """The text of the ``file`` that ``flag`` names, with every prefix in it changed.

    Raises:
        JobError: where there is none, or it is not what Megatron reads there.
    """
    try:
        text = Path(file).read_text()
        if flag == LIST:
            return "\n".join(with_prefixes(text.split(), change)) + "\n"
        stored = json.loads(text)
        if flag == COUNTS:
            return json.dumps({change(prefix): count for prefix, count in stored.items()}, indent=1)
        return json.dumps({part: _changed_part(blend, change) for part, blend in stored.items()}, indent=1)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        shown = getattr(error, "strerror", None) or error
        raise JobError(f"{flag} {file}: expected a file as Megatron reads it ({shown})") from error


def _changed_part(blend: Any, change: Callable[[str], str]) -> Any:
    words = blend.split() if isinstance(blend, str) else blend
    return words if words is None else with_prefixes(words, change)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
