"""How large what crosses a hop is.  Pure Python; the transport allocates by it, and ``sla-plan`` prints it.

Legend: ``q`` sequence length, ``b`` microbatch size, ``h`` hidden size, ``T`` and ``C`` tensor- and context-parallel
sizes.  Every figure is of one tensor-parallel rank and one microbatch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .declarations import CrossLayerTensor


class Columns(NamedTuple):
    """Elements that some tensors have at each position of a sample.

    Attributes:
        whole: of the tensors that have all positions of their context-parallel rank.
        split: of those that follow the hidden states, which sequence parallelism splits.
    """

    whole: int = 0
    split: int = 0

    @classmethod
    def of(cls, tensors: Iterable[CrossLayerTensor], tensor_parallel_rank: int) -> Columns:
        """Of ``tensors`` together, as ``tensor_parallel_rank`` has them."""
        counts = [0, 0]
        for tensor in tensors:
            counts[tensor.follows_hidden] += tensor.widths[tensor_parallel_rank] * tensor.unit
        return cls(*counts)


@dataclass(frozen=True)
class MicrobatchShape:
    """The sizes of one microbatch's tensors, in elements.

    Args:
        sequence_length: ``q``, of the whole sequence.
        microbatch_size: ``b``.
        hidden_size: ``h``.
        tensor_parallel_size: ``T``.
        context_parallel_size: ``C``.
        sequence_parallel: whether hidden states are split over the sequence between tensor-parallel ranks.
    """

    sequence_length: int
    microbatch_size: int
    hidden_size: int
    tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False

    @property
    def positions(self) -> int:
        """``q / C``: the positions that a context-parallel rank holds."""
        return self.sequence_length // self.context_parallel_size

    @property
    def hidden_positions(self) -> int:
        """``q / C``, divided by ``T`` with sequence parallelism: the positions whose hidden states a rank holds."""
        return self.positions // (self.tensor_parallel_size if self.sequence_parallel else 1)

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        """``[q/C(/T), b, h]``."""
        return (self.hidden_positions, self.microbatch_size, self.hidden_size)

    @property
    def hidden_elements(self) -> int:
        """Elements of the hidden states."""
        return self.hidden_positions * self.microbatch_size * self.hidden_size

    def tensor_shape(self, tensor: CrossLayerTensor, tensor_parallel_rank: int) -> tuple[int, int, int, int]:
        """``[q/C(/T), b, width, unit]`` of a declared tensor."""
        positions = self.hidden_positions if tensor.follows_hidden else self.positions
        return (positions, self.microbatch_size, tensor.widths[tensor_parallel_rank], tensor.unit)

    def elements(self, columns: Columns) -> int:
        """Elements of the tensors that have these ``columns``."""
        return self.microbatch_size * (self.positions * columns.whole + self.hidden_positions * columns.split)

    def payload_elements(self, columns: Columns) -> int:
        """Elements that cross a hop together with ``columns``; as many gradients come back."""
        return self.hidden_elements + self.elements(columns)

    def payload_shape(self, columns: Columns, hidden_states: int = 1) -> tuple[int, int, int]:
        """The payload's shape, ``[n q/C(/T), b, h + w]``: what crosses layers widens the feature dimension.

        ``hidden_states``, ``n``, is more than 1 where nothing else crosses: behind all layers that could read it.
        """
        rows = self.hidden_positions * self.microbatch_size
        width = self.payload_elements(columns) // rows
        return (self.hidden_positions * hidden_states, self.microbatch_size, width)
