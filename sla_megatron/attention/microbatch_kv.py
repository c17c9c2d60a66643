"""Where skip-layer K/V live between the layer that projects them and the layer that reads them.

One :class:`MicrobatchKV` exists for the length of one microbatch's forward through one block.  Nothing is left on a
module: attention finds the object that its block opened through :func:`current`, and each K/V is handed out once and
forgotten, so that after the forward only autograd's own graph holds it.

A *bundle* is what one layer hands to one later layer: the key and the value, each ``[s, b, groups, d]``, of this
tensor-parallel rank's groups that share a distance.  It is named by its source layer and distance, ``(layer, n)``, and
has exactly one reader, layer ``layer + n``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .roles import BundleName

#: key and value, each [s, b, groups, d]
Bundle = tuple[Tensor, Tensor]

#: the same, each in pieces along the groups
BundlePieces = tuple[Sequence[Tensor], Sequence[Tensor]]


class MicrobatchKV:
    """The bundles that are waiting for their reader, in one microbatch."""

    def __init__(self, waiting: Mapping[BundleName, Bundle] | None = None) -> None:
        self._waiting: dict[BundleName, Bundle | BundlePieces] = dict(waiting or {})

    def put(self, name: BundleName, bundle: Bundle | BundlePieces) -> None:
        """Hand over a bundle, whole or in pieces.  Raises ``RuntimeError`` if that one is already waiting."""
        if name in self._waiting:
            raise RuntimeError(f"skip-layer K/V of layer {name[0]}, distance {name[1]} were handed over twice")
        self._waiting[name] = bundle

    def take(self, name: BundleName) -> Bundle:
        """Receive a bundle, whole; one that was handed over in pieces gets memory of its own.

        It is forgotten here.  Raises ``RuntimeError`` where there is none: never a fall-back.
        """
        bundle = self._pop(name)
        return bundle if isinstance(bundle[0], Tensor) else (_whole(bundle[0]), _whole(bundle[1]))

    def take_pieces(self, name: BundleName, sizes: Sequence[int]) -> BundlePieces:
        """:meth:`take` in pieces of ``sizes`` groups, which are views wherever the bundle's own pieces allow it."""
        bundle = self._pop(name)
        return tuple(_in_pieces(part, sizes) for part in bundle)

    def _pop(self, name: BundleName) -> Bundle | BundlePieces:
        try:
            return self._waiting.pop(name)
        except KeyError:
            raise RuntimeError(
                f"layer {name[0] + name[1]} needs skip-layer K/V of layer {name[0]} (distance {name[1]}), which this "
                f"microbatch does not hold; it holds {sorted(self._waiting)}"
            ) from None

    def take_all(self, names: Sequence[BundleName]) -> list[Tensor]:
        """The tensors of ``names``, key and value in turn."""
        return [tensor for name in names for tensor in self.take(name)]

    def put_all(self, names: Sequence[BundleName], tensors: Sequence[Tensor]) -> None:
        """The reverse of :meth:`take_all`."""
        for name, key, value in zip(names, tensors[0::2], tensors[1::2], strict=True):
            self.put(name, (key, value))

    def require_empty(self) -> None:
        """Raise ``RuntimeError`` if a bundle found no reader."""
        if self._waiting:
            raise RuntimeError(f"skip-layer K/V found no reader in this microbatch: {sorted(self._waiting)}")


def _whole(pieces: Sequence[Tensor]) -> Tensor:
    """The pieces as one tensor ``[s, b, groups, d]``, no view of a projection that it would keep alive."""
    return torch.cat(list(pieces), dim=2) if len(pieces) > 1 else pieces[0].contiguous()


def _in_pieces(part: Tensor | Sequence[Tensor], sizes: Sequence[int]) -> Sequence[Tensor]:
    if not isinstance(part, Tensor):
        if [piece.shape[2] for piece in part] == list(sizes):
            return part
        part = _whole(part)
    return part.split(list(sizes), dim=2)


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
