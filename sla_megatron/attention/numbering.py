"""The two numbers of an attention layer: among the attention layers, and in the stack of all layers.  Pure Python.

Skip-layer attention counts attention layers alone, ``1..L``.  Megatron's modules, what crosses a pipeline's stages and
recomputation count every layer.  In a GPT both are the same; in a hybrid model, ``*-*-`` say, attention layer 2 is
layer 3 of the stack.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..common.patterns import attention_layers, kinds


@dataclass(frozen=True)
class LayerNumbers:
    """Which layers of a stack are its attention layers.

    Args:
        attention: the attention layers' numbers in the stack, ascending, from 1.
        num_layers: how many layers of all kinds the stack has.
    """

    attention: tuple[int, ...]
    num_layers: int

    @classmethod
    def of_gpt(cls, num_layers: int) -> LayerNumbers:
        """Of a model whose every layer has attention."""
        return cls(tuple(range(1, num_layers + 1)), num_layers)

    @classmethod
    def of_pattern(cls, pattern: str) -> LayerNumbers:
        """Of a hybrid model, by its ``--hybrid-layer-pattern``."""
        return cls(attention_layers(pattern), len(kinds(pattern)))

    def in_stack(self, attention_layer: int) -> int:
        """The number in the stack of attention layer ``attention_layer``, ``1..L``."""
        return self.attention[attention_layer - 1]

    def among_attention(self, stack_layer: int) -> int:
        """The reverse.  Raises ``ValueError`` for a layer that is no attention layer."""
        if stack_layer not in self._index:
            raise ValueError(f"layer {stack_layer} is no attention layer; those are {self.attention}")
        return self._index[stack_layer]

    @cached_property
    def _index(self) -> dict[int, int]:
        return {number: index for index, number in enumerate(self.attention, start=1)}
