"""Under which key a checkpoint holds a tensor of the table in ``mapping.py``, and which layer of it.

A GPT holds its layers as one tensor, or each under its number; a hybrid model holds an attention and its MLP under
numbers of their own.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Container

from ...common.layer_pairs import LayerPairs, split_layer
from ...flags.asked import hybrid_pattern
from .errors import ConvertError


class StoredKeys:
    """The keys of one model's checkpoint.

    Args:
        args: of the model, as Megatron stores them; a hybrid model's layers are pairs.

    Raises:
        ConvertError: where they are not.
    """

    def __init__(self, args: Namespace) -> None:
        pattern = hybrid_pattern(args)
        try:
            self._pairs = LayerPairs.of(pattern) if pattern else None
        except ValueError as error:
            raise ConvertError(f"--hybrid-layer-pattern {pattern}: expected {error}") from error

    def place(self, name: str, layer: int | None, stored: Container[str]) -> tuple[str, int | None]:
        """The key of ``name``, and its place on the axis of layers, where that key holds all of them.

        Args:
            name: as the table has it, without the layer.
            layer: from 0; ``None`` outside of the layers.
            stored: the keys that there are.
        """
        if self._pairs is not None:
            return self._pairs.to_stack(name, layer), None
        if layer is None or name in stored:
            return name, layer
        return name.replace("decoder.layers.", f"decoder.layers.{layer}."), None

    def name(self, key: str, layer: int | None) -> tuple[str | None, int | None]:
        """The reverse: the table's name, and the layer; ``None`` for a layer that the table knows nothing of."""
        if self._pairs is not None:
            key = self._pairs.to_gpt(key) or ""
        name, number = split_layer(key)
        return name or None, layer if number is None else number
