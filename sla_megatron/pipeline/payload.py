"""How large what crosses a hop is.  Pure Python; the transport allocates by it, and ``sla-plan`` prints it.

Legend: ``q`` sequence length, ``b`` microbatch size, ``h`` hidden size, ``d`` head size, ``T`` and ``C`` tensor- and
context-parallel sizes.  Every figure is of one tensor-parallel rank and one microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MicrobatchShape:
    """The sizes of one microbatch's tensors, in elements.

    Args:
        sequence_length: ``q``, of the whole sequence.
        microbatch_size: ``b``.
        hidden_size: ``h``.
        head_size: ``d``.
        tensor_parallel_size: ``T``.
        context_parallel_size: ``C``.
        sequence_parallel: whether hidden states are split over the sequence between tensor-parallel ranks.
    """

    sequence_length: int
    microbatch_size: int
    hidden_size: int
    head_size: int
    tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False

    @property
    def kv_sequence(self) -> int:
        """``q / C``: the positions whose K/V a rank holds, all of them for its own heads."""
        return self.sequence_length // self.context_parallel_size

    @property
    def hidden_sequence(self) -> int:
        """``q / C``, divided by ``T`` with sequence parallelism: the positions whose hidden states a rank holds."""
        return self.kv_sequence // (self.tensor_parallel_size if self.sequence_parallel else 1)

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        """``[q/C(/T), b, h]``."""
        return (self.hidden_sequence, self.microbatch_size, self.hidden_size)

    def kv_shape(self, num_groups: int) -> tuple[int, int, int, int]:
        """``[q/C, b, groups, d]``: the keys, or the values, of ``num_groups`` groups."""
        return (self.kv_sequence, self.microbatch_size, num_groups, self.head_size)

    @property
    def hidden_elements(self) -> int:
        """Elements of the hidden states."""
        return self.hidden_sequence * self.microbatch_size * self.hidden_size

    def kv_elements(self, num_groups: int) -> int:
        """Elements of the keys and values of ``num_groups`` groups."""
        return 2 * self.kv_sequence * self.microbatch_size * num_groups * self.head_size

    def payload_elements(self, num_groups: int) -> int:
        """Elements that cross a hop together with ``num_groups`` K/V groups; as many gradients come back."""
        return self.hidden_elements + self.kv_elements(num_groups)

    def payload_shape(self, num_groups: int, hidden_states: int = 1) -> tuple[int, int, int]:
        """The payload's shape, ``[n q/C(/T), b, h + w]``: K/V widen the feature dimension.

        ``hidden_states``, ``n``, is more than 1 where no K/V cross: behind all layers that could read them.
        """
        rows = self.hidden_sequence * self.microbatch_size
        width = self.payload_elements(num_groups) // rows
        return (self.hidden_sequence * hidden_states, self.microbatch_size, width)
