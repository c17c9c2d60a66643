"""What a user sees when a corpus cannot be prepared: one line, nothing lost."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ...common.errors import StartError


class DataError(StartError):
    """Why ``sla-data`` stops, as one line that names the file, flag or document."""


@contextmanager
def file_errors(what: str) -> Iterator[None]:
    """Turn what the file system refuses inside the block into one line that begins with ``what``."""
    try:
        yield
    except OSError as error:
        reason = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise DataError(f"{what}: {reason}") from error
