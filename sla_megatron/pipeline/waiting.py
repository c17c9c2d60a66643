"""Where tensors that cross layers live between the layer that makes them and the layers that read them.

One :class:`Microbatch` exists for the length of one microbatch's forward through one block.  Nothing is left on a
module: a layer finds the object that its block opened (:func:`hand_over`, :func:`receive`), and each tensor is
forgotten with its last use, so that after the forward only autograd's own graph holds it.

Where a block takes a tensor several times (layers that read it, its end that sends it and keeps it), autograd sums the
gradients: the last use's first, since backward goes through a graph in the reverse order of its making.  What comes
back over a hop is one gradient, already the sum of all that lie behind it.

A tensor may be handed over in pieces along its width: views of a larger one, say, which are joined where it matters.

Shapes: s positions, b microbatch; pieces are ``[s, b, width, unit]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from .declarations import Name
from .joining import joined

#: One tensor, in pieces along its width: one piece where it lies together.
Pieces = Sequence[Tensor]


class Microbatch:
    """The tensors that are waiting for their readers, in one microbatch.

    Args:
        uses: how often each tensor is taken here; ``None``: each once.
    """

    def __init__(self, uses: Mapping[Name, int] | None = None) -> None:
        self._uses = uses
        self._waiting: dict[Name, Pieces] = {}
        self._left: dict[Name, int] = {}

    def put(self, name: Name, pieces: Pieces, uses: int | None = None) -> None:
        """Hand over a tensor, for as many ``uses`` as the microbatch was opened for.

        Raises ``RuntimeError`` if that one is already waiting, or if none of the declared tensors has that name.
        """
        if name in self._waiting:
            raise RuntimeError(f"{name}: handed over twice in one microbatch")
        if uses is None:
            uses = 1 if self._uses is None else self._uses.get(name, 0)
        if not uses:
            raise RuntimeError(f"{name}: handed over, but not declared for any later layer")
        self._waiting[name], self._left[name] = pieces, uses

    def take(self, name: Name, uses: int = 1) -> Pieces:
        """Receive a tensor, for so many of its uses; with its last use it is forgotten here.

        Raises ``RuntimeError`` where there is none: never a fall-back.
        """
        if self._left.get(name, 0) < uses:
            raise RuntimeError(
                f"{name}: a layer needs it, which this microbatch does not hold; it holds "
                f"{', '.join(map(str, self._waiting)) or 'nothing'}"
            )
        self._left[name] -= uses
        if self._left[name]:
            return self._waiting[name]
        del self._left[name]
        return self._waiting.pop(name)

    def require_empty(self) -> None:
        """Raise ``RuntimeError`` if a tensor did not find all of its readers."""
        if self._waiting:
            left = ", ".join(f"{name} ({self._left[name]} times)" for name in self._waiting)
            raise RuntimeError(f"found no reader in this microbatch: {left}")


_current: ContextVar[Microbatch | None] = ContextVar("sla_microbatch", default=None)


def current() -> Microbatch:
    """The object of the microbatch that is running.  Raises ``RuntimeError`` outside of one."""
    held = _current.get()
    if held is None:
        raise RuntimeError(
            "a layer that shares tensors with others ran outside of a block that carries them, so there is no "
            "microbatch to share in: build the model with sla_megatron.gpt_config_from_args, or inside "
            "sla_megatron.sla_transformer_blocks()"
        )
    return held


@contextmanager
def microbatch(uses: Mapping[Name, int] | None = None) -> Iterator[Microbatch]:
    """Open a microbatch in which each tensor is taken ``uses`` times; at the end nothing may be waiting."""
    held = Microbatch(uses)
    token = _current.set(held)
    try:
        yield held
        held.require_empty()
    finally:
        _current.reset(token)


def hand_over(name: Name, tensor: Tensor) -> None:
    """Leave ``tensor`` for the layers that are declared to read it.  Called within the forward pass of its source.

    Gradients of all readers come back into it, over any stages between them.

    Args:
        name: as declared.
        tensor: ``[s, b, width, unit]`` of the declared sizes.  It must not be written to afterwards.

    Raises:
        RuntimeError: outside of a block that carries tensors, and for a name that is not declared.
    """
    current().put(name, (tensor,))


def receive(name: Name) -> Tensor:
    """What an earlier layer handed over, ``[s, b, width, unit]``.  Called once within a reader's forward pass.

    Raises ``RuntimeError`` where it is not there.
    """
    (whole,) = joined([current().take(name)])
    return whole
