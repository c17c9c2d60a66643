"""What a user sees when a flag, or a combination of flags, cannot be accepted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class FlagError(Exception):
    """A flag whose value cannot be accepted: one line that names flag, value and what would be accepted.

    Not a ``ValueError``: argparse turns those, in a flag's ``type``, into Megatron's usage text of two thousand lines.
    """

    def __init__(self, flag: str, value: object, accepted: str) -> None:
        self.flag, self.value, self.accepted = flag, value, accepted
        shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
        given = "without a value" if shown in ("", None) else shown
        super().__init__(f"sla-megatron: error: {flag} {given}: expected {accepted}")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a :class:`FlagError` inside the block into its one line, on rank 0's stderr, and exit status 2."""
    try:
        yield
    except FlagError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        sys.exit(2)
