"""``RUN/stop``: whoever may write to the run's folder ends the run after a save.  It is never removed here."""

from __future__ import annotations

import time
from pathlib import Path

from .flags import JobError


def stop_file(run: Path) -> str | None:
    """The file and who made it, as ``runs/gpt/stop (of alice, since 2026-01-31 12:00)``; ``None`` without one."""
    path = run / "stop"
    try:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.lstat().st_mtime))
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        owner = path.owner()
    except (KeyError, OSError):
        # A container need not know the users of the cluster.
        owner = f"user {path.lstat().st_uid}"
    return f"{path} (of {owner}, since {since})"


def refuse_if_stopped(run: Path) -> None:
    """Raises JobError, one line, while somebody wants the run to stay as it is."""
    if (found := stop_file(run)) is not None:
        raise JobError(f"{found} is there, nothing is trained: expected it to be removed, if the run is to go on")
