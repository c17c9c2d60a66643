"""Where skip-layer K/V live between the layer that projects them and the layer that reads them.

One :class:`MicrobatchKV` exists for the length of one microbatch's forward through one block.  Nothing is left on a
module: attention finds the object that its block opened through :func:`current`, and each K/V is handed out once and
forgotten, so that after the forward only autograd's own graph holds it.

A *bundle* is what one layer hands to one later layer: keys and values of this tensor-parallel rank's groups that share
a distance.  It is named by its source layer and distance, ``(layer, n)``, and has exactly one reader, layer
``layer + n``.

Shapes: s sequence, b microbatch, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from .roles import BundleName


@dataclass(frozen=True, eq=False)
class Bundle:
    """Keys and values, each in pieces ``[s, b, groups, d]`` along the groups: one piece where they lie together."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    def cut(self, sizes: Sequence[int]) -> Bundle:
        """The same in pieces of ``sizes`` groups, which are views wherever its own pieces allow it."""
        if [piece.shape[2] for piece in self.keys] == list(sizes):
            return self
        key, value = self.joined()
        return Bundle(key.split(list(sizes), dim=2), value.split(list(sizes), dim=2))

    def joined(self) -> tuple[Tensor, Tensor]:
        """Key and value, each whole, in memory of their own: no views of a projection that they would keep alive."""
        key, value = (
            torch.cat(list(pieces), dim=2) if len(pieces) > 1 else pieces[0].contiguous()
            for pieces in (self.keys, self.values)
        )
        return key, value


class MicrobatchKV:
    """The bundles that are waiting for their reader, in one microbatch."""

    def __init__(self, waiting: Mapping[BundleName, Bundle] | None = None) -> None:
        self._waiting: dict[BundleName, Bundle] = dict(waiting or {})

    def put(self, name: BundleName, bundle: Bundle) -> None:
        """Hand over a bundle.  Raises ``RuntimeError`` if that one is already waiting."""
        if name in self._waiting:
            raise RuntimeError(f"skip-layer K/V of layer {name[0]}, distance {name[1]} were handed over twice")
        self._waiting[name] = bundle

    def take(self, name: BundleName) -> Bundle:
        """Receive a bundle, and forget it here.  Raises ``RuntimeError`` where there is none: never a fall-back."""
        try:
            return self._waiting.pop(name)
        except KeyError:
            raise RuntimeError(
                f"layer {name[0] + name[1]} needs skip-layer K/V of layer {name[0]} (distance {name[1]}), which this "
                f"microbatch does not hold; it holds {sorted(self._waiting)}"
            ) from None

    def require_empty(self) -> None:
        """Raise ``RuntimeError`` if a bundle found no reader."""
        if self._waiting:
            raise RuntimeError(f"skip-layer K/V found no reader in this microbatch: {sorted(self._waiting)}")


_current: ContextVar[MicrobatchKV | None] = ContextVar("sla_microbatch_kv", default=None)


def current() -> MicrobatchKV:
    """The object of the microbatch that is running.  Raises ``RuntimeError`` outside of one."""
    kv = _current.get()
    if kv is None:
        raise RuntimeError(
            "skip-layer attention ran outside of an SLATransformerBlock, so there is no microbatch to share K/V in: "
            "build the model with sla_megatron.gpt_config_from_args, or inside sla_megatron.sla_transformer_blocks()"
        )
    return kv


@contextmanager
def microbatch(waiting: Mapping[BundleName, Bundle] | None = None) -> Iterator[MicrobatchKV]:
    """Open a microbatch, with bundles that already wait in it; every bundle must have found its reader at the end."""
    kv = MicrobatchKV(waiting)
    token = _current.set(kv)
    try:
        yield kv
        kv.require_empty()
    finally:
        _current.reset(token)
