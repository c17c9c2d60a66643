"""What a conversion reads from, whatever its format: fields of ``config.json``, and tensors by their name there."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, dtype


class Source(Protocol):
    """One model's weights, read a tensor at a time.

    Attributes:
        path: where it is, for messages.
        config: the fields of ``config.json``.
        args: Megatron's arguments, where the source has them.
    """

    path: Path
    config: Mapping[str, Any]
    args: Namespace | None

    def dtype(self, name: str) -> dtype:
        """The stored type of a tensor."""

    def get(self, name: str) -> Tensor:
        """A tensor by its Hugging Face name, on the CPU.  Raises ``ConvertError`` if it cannot be read."""

    def padding(self, name: str) -> Tensor | None:
        """The rows that Megatron padded a vocabulary tensor with; ``None`` where they are not known."""
