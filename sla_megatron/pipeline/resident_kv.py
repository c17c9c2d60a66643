"""K/V that wait on a rank for a later virtual stage of the same microbatch, and their gradients on the way back.

The stage that keeps a bundle and the stage that reads it have separate autograd graphs, run backward by separate calls
of Megatron's schedule, the reader's first.  The reader therefore starts from detached tensors.  In its backward pass
their gradients are deposited here; in the keeper's, they are collected and go on into the graph that made the K/V.

Nothing is collective and nothing retains a graph.  Each bundle has one reader, so that its gradient is one deposit, and
the sum with the source layer's own gradient is autograd's, in the order of the graph: a run repeats bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..attention.roles import BundleName


class _State(Enum):
    KEPT = "kept"
    FETCHED = "fetched"
    DEPOSITED = "given a gradient"
    COLLECTED = "collected"


class Resident:
    """One bundle of one microbatch.  It is kept, fetched, and in training given a gradient that is collected."""

    def __init__(self, name: BundleName, microbatch: int) -> None:
        self.label = f"skip-layer K/V of layer {name[0]} (distance {name[1]}), microbatch {microbatch}"
        self.state = _State.KEPT
        self._tensors: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held now: key and value, or their gradients, or nothing."""
        return self._tensors

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """Hold key and value, cut off from the graph that made them."""
        self._tensors = tuple(tensor.detach() for tensor in tensors)

    def fetch(self) -> tuple[Tensor, ...]:
        """Hand out key and value, which are not held any longer."""
        return self._move(_State.KEPT, _State.FETCHED)

    def deposit(self, gradients: Sequence[Tensor]) -> None:
        """Hold the gradients that the reader found."""
        self._move(_State.FETCHED, _State.DEPOSITED)
        self._tensors = tuple(gradients)

    def collect(self) -> tuple[Tensor, ...]:
        """Hand out the gradients, which are not held any longer."""
        return self._move(_State.DEPOSITED, _State.COLLECTED)

    def _move(self, before: _State, after: _State) -> tuple[Tensor, ...]:
        if self.state is not before:
            raise RuntimeError(f"{self.label}: {self.state.value}, cannot be {after.value}")
        self.state = after
        tensors, self._tensors = self._tensors, ()
        return tensors


class _Keep(torch.autograd.Function):
    """Passes hidden states through; what it keeps gets, in backward, the gradients that were deposited for it."""

    @staticmethod
    def forward(ctx: Any, resident: Resident, hidden_states: Tensor, *tensors: Tensor) -> Tensor:
        resident.keep(tensors)
        ctx.resident = resident
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, gradient, *ctx.resident.collect()


class _Fetch(torch.autograd.Function):
    """Hands out what is resident; ``anchor`` only makes autograd call the backward, which deposits the gradients."""

    @staticmethod
    def forward(ctx: Any, resident: Resident, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.resident = resident
        return resident.fetch()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        # They come as views of the gradient of all that the reader read, which would be kept alive with them.
        ctx.resident.deposit([gradient.contiguous() for gradient in gradients])
        return None, None


class ResidentKV:
    """Everything resident on one rank in one run of a schedule."""

    def __init__(self) -> None:
        self._residents: dict[tuple[BundleName, int], Resident] = {}

    def keep(self, name: BundleName, microbatch: int, bundle: Sequence[Tensor], hidden_states: Tensor) -> Tensor:
        """Keep a bundle's pieces.  The hidden states that it returns must be used in place of those given.

        Raises ``RuntimeError`` if that bundle of that microbatch is already there.
        """
        if (name, microbatch) in self._residents:
            raise RuntimeError(f"{self._residents[name, microbatch].label}: kept twice")
        resident = self._residents[name, microbatch] = Resident(name, microbatch)
        return _Keep.apply(resident, hidden_states, *bundle)

    def fetch(self, name: BundleName, microbatch: int, anchor: Tensor) -> tuple[Tensor, ...]:
        """The pieces, ``[s, b, groups, d]``; ``anchor`` is any input of the stage.

        Raises ``RuntimeError`` where that bundle of that microbatch is not resident, or was fetched before.
        """
        resident = self._residents.get((name, microbatch))
        if resident is None:
            raise RuntimeError(
                f"layer {sum(name)} needs skip-layer K/V of layer {name[0]} (distance {name[1]}), microbatch "
                f"{microbatch}, which this rank does not hold"
            )
        return _Fetch.apply(resident, anchor)

    def require_released(self, forward_only: bool) -> None:
        """Raise ``RuntimeError`` unless every bundle was read and, in training, its gradient given and collected."""
        end = _State.FETCHED if forward_only else _State.COLLECTED
        left = [resident for resident in self._residents.values() if resident.state is not end]
        if left:
            raise RuntimeError(
                f"{len(left)} of {len(self._residents)} resident bundles were not {end.value} by the end of the step, "
                f"the first: {left[0].label}: {left[0].state.value}"
            )

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held now."""
        return [tensor for resident in self._residents.values() for tensor in resident.tensors]
