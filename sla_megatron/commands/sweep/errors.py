"""What ends a sweep, each as one line."""

from __future__ import annotations

from ...common.errors import StartError


class SweepError(StartError):
    """A grid, folder or command that cannot be accepted: nothing was written, exit status 2."""


class GridError(SweepError):
    """A value of the grid's file: key, value, what is accepted."""

    def __init__(self, key: str, value: object, accepted: str) -> None:
        super().__init__(f"{key}: {'nothing' if value is None else value}: expected {accepted}")


class RunFailed(Exception):
    """One run ended without a result; the others can go on."""


class RunBusy(Exception):
    """One run is being trained by another process."""
