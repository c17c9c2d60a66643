"""Point-to-point communication in which every payload has its own, known shape.

Upstream has two modes: one shape for all, or shapes that neighbours tell each other before each tensor, which costs a
message and a host synchronisation a hop.  Here the second mode runs without its messages: the order of passes on both
neighbours is known, so that the k-th tensor a rank receives has a shape that both can compute.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from ..upstream.seams import Reliance
from .payload import MicrobatchShape
from .routes import RoutePlan
from .schedule import Pass, Schedule

Shape = tuple[int, int, int]

COMMUNICATOR = (
    Reliance(
        "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate_shapes",
        "overridden by SLAP2PCommunicator, which knows the shapes that neighbours would tell each other",
        ("self", "tensor_send_next", "tensor_send_prev", "recv_prev", "recv_next"),
    ),
    Reliance(
        "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator.__init__",
        "overridden by SLAP2PCommunicator, which takes the shapes to come",
        ("self", "pp_group", "config"),
    ),
)


@dataclass
class PayloadOrder:
    """The shapes of what one rank exchanges with its neighbours in one run of a schedule, in order.

    Attributes:
        forward_sent, forward_received: to the next rank, from the previous one.
        backward_sent, backward_received: gradients, to the previous rank, from the next one.
    """

    forward_sent: list[Shape]
    forward_received: list[Shape]
    backward_sent: list[Shape]
    backward_received: list[Shape]

    @classmethod
    def of(
        cls, plan: RoutePlan, schedule: Schedule, shape: MicrobatchShape, rank: int, tensor_parallel_rank: int
    ) -> PayloadOrder:
        """What pipeline ``rank`` exchanges."""
        layout = plan.layout
        size, last = layout.pipeline_size, layout.num_stages - 1
        shapes = [
            shape.payload_shape(plan.hop_columns(hop, tensor_parallel_rank), layout.hidden_states(hop))
            for hop in range(last)
        ]

        def across(passes: list[Pass], its_rank: int) -> list[Shape]:
            """The shapes of the hops that ``its_rank``'s passes cross: the one after each forward's stage, or before
            each backward's."""
            stages = [layout.stage(its_rank, chunk) for _, chunk, _ in passes]
            if passes and passes[0].kind == "F":
                return [shapes[stage] for stage in stages if stage != last]
            return [shapes[stage - 1] for stage in stages if stage != 0]

        forwards, backwards = schedule.forwards(), schedule.backwards()
        return cls(
            forward_sent=across(forwards, rank),
            forward_received=across(forwards, (rank - 1) % size),
            backward_sent=across(backwards, rank),
            backward_received=across(backwards, (rank + 1) % size),
        )


class SLAP2PCommunicator(P2PCommunicator):
    """Upstream's communicator for one run of a schedule, with each payload's shape known beforehand.

    Args:
        pp_group: the pipeline's process group.
        config: the model's; a copy is taken.
        order: the shapes to come.
    """

    def __init__(self, pp_group: dist.ProcessGroup, config: ModelParallelConfig, order: PayloadOrder) -> None:
        config = copy.copy(config)
        # The mode in which upstream asks _communicate_shapes before it allocates what it receives.
        config.variable_seq_lengths = True
        super().__init__(pp_group, config)
        self._order = {name: iter(shapes) for name, shapes in vars(order).items()}

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        """The shapes to receive, from the previous and from the next rank; nothing is communicated.

        Raises ``RuntimeError``, before anything is sent, where a tensor has not the shape that its receiver expects.
        """
        self._check("forward_sent", tensor_send_next)
        self._check("backward_sent", tensor_send_prev)
        return self._next("forward_received", recv_prev), self._next("backward_received", recv_next)

    def _check(self, direction: str, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        expected = self._take(direction)
        if tuple(tensor.shape) != expected:
            raise RuntimeError(
                f"pipeline rank {self.current_stage} is about to send a tensor of shape {tuple(tensor.shape)} "
                f"({direction}), where its receiver expects {expected}"
            )

    def _next(self, direction: str, wanted: bool) -> list[int]:
        # Upstream's answer where nothing is received.
        return list(self._take(direction)) if wanted else [0, 0, 0]

    def _take(self, direction: str) -> Shape:
        shape = next(self._order[direction], None)
        if shape is None:
            raise RuntimeError(f"pipeline rank {self.current_stage}: the schedule has no tensor left ({direction})")
        return shape

    def require_exhausted(self) -> None:
        """Raise ``RuntimeError`` if the schedule ended with tensors not sent or received."""
        left = {direction: len(list(shapes)) for direction, shapes in self._order.items()}
        if any(left.values()):
            raise RuntimeError(f"pipeline rank {self.current_stage}: the schedule ended with tensors left: {left}")
