"""Tensors that wait on a rank for later virtual stages of the same microbatch, and their gradients on the way back.

The stage that keeps a tensor and the stages that read it have separate autograd graphs, run backward by separate calls
of Megatron's schedule, the last reader's first.  Each reader therefore starts from a detached tensor.  In its backward
pass the gradient is deposited here, added to what later readers left; in the keeper's, the sum is collected and goes on
into the graph that made the tensor.

Nothing is collective and nothing retains a graph.  Readers' backward passes come in one order, that of the schedule,
and the sum with the gradients of the keeper's own stage is autograd's, in the order of the graph: a run repeats bit
for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .declarations import Name


class _State(Enum):
    KEPT = "kept"
    FETCHED = "fetched"
    DEPOSITED = "given a gradient"
    COLLECTED = "collected"


class Resident:
    """One tensor of one microbatch.  It is kept, fetched, and in training given gradients; their sum is collected.

    Args:
        name: of the tensor.
        microbatch: its number.
        readers: how many fetch it, and give it a gradient.
    """

    def __init__(self, name: Name, microbatch: int, readers: int = 1) -> None:
        self.label = f"{name}, microbatch {microbatch}"
        self.state = _State.KEPT
        self._readers = self._awaited = readers
        self._tensor: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held now: the tensor, or its gradient, or nothing."""
        return () if self._tensor is None else (self._tensor,)

    def keep(self, tensor: Tensor) -> None:
        """Hold ``tensor``, cut off from the graph that made it."""
        self._tensor = tensor.detach()

    def fetch(self) -> Tensor:
        """Hand it out; with the last of its readers it is not held any longer."""
        self._require(_State.KEPT, _State.FETCHED)
        self._awaited -= 1
        if self._awaited:
            return self._tensor.detach()
        self.state, self._awaited = _State.FETCHED, self._readers
        return self._let_go()

    def deposit(self, gradient: Tensor) -> None:
        """Hold the gradient that a reader found, added to what others did."""
        self._require(_State.FETCHED, _State.DEPOSITED)
        if self._tensor is not None:
            # The last reader's comes first, then the one before it: the schedule's order of backward passes, which does
            # not depend on when messages come.
            self._tensor.add_(gradient)
        elif self._readers > 1:
            self._tensor = gradient.clone(memory_format=torch.contiguous_format)
        else:
            # It may be a view of the gradient of all that the reader read, which would be kept alive with it.
            self._tensor = gradient.contiguous()
        self._awaited -= 1
        if not self._awaited:
            self.state = _State.DEPOSITED

    def collect(self) -> Tensor:
        """Hand out the gradient, which is not held any longer."""
        self._require(_State.DEPOSITED, _State.COLLECTED)
        self.state = _State.COLLECTED
        return self._let_go()

    def _require(self, state: _State, then: _State) -> None:
        if self.state is not state:
            raise RuntimeError(f"{self.label}: {self.state.value}, cannot be {then.value}")

    def _let_go(self) -> Tensor:
        tensor, self._tensor = self._tensor, None
        return tensor


class _Keep(torch.autograd.Function):
    """Passes hidden states through; what it keeps gets, in backward, the gradients that were deposited for it."""

    @staticmethod
    def forward(ctx: Any, residents: Sequence[Resident], hidden_states: Tensor, *tensors: Tensor) -> Tensor:
        for resident, tensor in zip(residents, tensors, strict=True):
            resident.keep(tensor)
        ctx.residents = residents
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, gradient, *(resident.collect() for resident in ctx.residents)


class _Fetch(torch.autograd.Function):
    """Hands out what is resident; ``anchor`` only makes autograd call the backward, which deposits the gradients."""

    @staticmethod
    def forward(ctx: Any, residents: Sequence[Resident], anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.residents = residents
        return tuple(resident.fetch() for resident in residents)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        for resident, gradient in zip(ctx.residents, gradients, strict=True):
            resident.deposit(gradient)
        return None, None


class ResidentTensors:
    """Everything resident on one rank in one run of a schedule."""

    def __init__(self) -> None:
        self._residents: dict[tuple[Name, int], Resident] = {}

    def keep(
        self, names: Sequence[Name], readers: Sequence[int], microbatch: int, tensors: Sequence[Tensor], output: Tensor
    ) -> Tensor:
        """Keep tensors, each for so many ``readers``.  The output that it returns must be used in place of that given.

        Raises ``RuntimeError`` if one of them is already there.
        """
        residents = []
        for name, count in zip(names, readers, strict=True):
            if (name, microbatch) in self._residents:
                raise RuntimeError(f"{self._residents[name, microbatch].label}: kept twice")
            residents.append(Resident(name, microbatch, count))
            self._residents[name, microbatch] = residents[-1]
        return _Keep.apply(residents, output, *tensors)

    def fetch(self, names: Sequence[Name], microbatch: int, anchor: Tensor) -> tuple[Tensor, ...]:
        """Tensors that one reader reads at a time; ``anchor`` is any input of the stage.

        Raises ``RuntimeError`` where one of them is not resident, or was fetched by all of its readers before.
        """
        residents = []
        for name in names:
            if (name, microbatch) not in self._residents:
                raise RuntimeError(f"{name}, microbatch {microbatch}: a stage needs it, which this rank does not hold")
            residents.append(self._residents[name, microbatch])
        return _Fetch.apply(residents, anchor)

    def require_released(self, forward_only: bool) -> None:
        """Raise ``RuntimeError`` unless every tensor was read and, in training, its gradient given and collected."""
        end = _State.FETCHED if forward_only else _State.COLLECTED
        left = [resident for resident in self._residents.values() if resident.state is not end]
        if left:
            raise RuntimeError(
                f"{len(left)} of {len(self._residents)} resident tensors were not {end.value} by the end of the step, "
                f"the first: {left[0].label}: {left[0].state.value}"
            )

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held now."""
        return [tensor for resident in self._residents.values() for tensor in resident.tensors]
