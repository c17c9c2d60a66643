"""What a conversion reads from, whatever its format: fields of ``config.json``, and tensors by their name there."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
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

    def parts(self, name: str) -> Sequence[Tensor]:
        """The same tensor in parts of whole rows, one after the other, to be written and not to be written to.

        They are views of mapped files where that can be had, and need not lie where their type would have them.
        """

    def padding(self, name: str) -> Tensor | None:
        """The rows that Megatron padded a vocabulary tensor with; ``None`` where they are not known."""
