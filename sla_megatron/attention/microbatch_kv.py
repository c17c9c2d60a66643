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
from functools import lru_cache

from torch import Tensor

from .mixing import mix
from .mixing_plan import MixingPlan
from .roles import BundleName


@dataclass(frozen=True, eq=False)
class Bundle:
    """Keys and values, each in pieces ``[s, b, groups, d]`` along the groups: one piece where they lie together."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    def joined(self) -> tuple[Tensor, Tensor]:
        """Key and value, each whole, in memory of their own: no views of a projection that they would keep alive."""
        pieces = (*self.keys, *self.values)
        if len(pieces) == 2 and all(piece.is_contiguous() for piece in pieces):
            return pieces
        key, value = mix(
            _whole(*(tuple(piece.shape[2] for piece in side) for side in (self.keys, self.values))), pieces
        )
        return key, value


@lru_cache
def _whole(keys: Sequence[int], values: Sequence[int]) -> MixingPlan:
    """Pieces of these many groups put together."""
    sizes = (*keys, *values)
    heads = [(number, i) for number, size in enumerate(sizes) for i in range(size)]
    return MixingPlan(sizes, (tuple(heads[: sum(keys)]), tuple(heads[sum(keys) :])))


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
