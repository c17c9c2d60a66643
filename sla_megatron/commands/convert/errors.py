"""What a user sees when a conversion cannot be done: one line, before anything has its final name."""

from __future__ import annotations

from ...common.errors import StartError


class ConvertError(StartError):
    """Why a conversion stops, as one line that names the file, flag or tensor."""
