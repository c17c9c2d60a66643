"""What is said of tensors that cross layers: "layer a makes it, layers b and c read it, it has these sizes".

Pure Python.  Everything else here works on these declarations alone: what crosses each hop of a pipeline, what waits on
a rank, what recomputation must carry, and what a plan counts.  ``docs/cross-layer-tensors.md`` is for users of it.

Layers are numbered as Megatron numbers them in the stack, ``1..N``, whatever kinds they are of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256

#: What a tensor is called where it is handed over and received.  Its ``str`` is what messages call it, and its place
#: among tensors of the same source and readers.
Name = Hashable


@dataclass(frozen=True)
class CrossLayerTensor:
    """One tensor that a layer makes and later layers read, ``[positions, b, width, unit]`` on each rank.

    Attributes:
        name: unique among a model's.
        source: the layer that makes it.
        readers: the layers that read it, ascending, each later than ``source``.
        widths: its width on each tensor-parallel rank; where that is 0 there is no such tensor, neither handed over nor
            received.
        unit: elements of one step of the width, such as the channels of a head.
        follows_hidden: whether its positions are those of the hidden states, which sequence parallelism splits over the
            tensor-parallel ranks; else it has all positions of its context-parallel rank.
        readers_copy: whether no reader keeps it, or a view of it, for its backward pass; what arrives in a payload is
            then not copied out of it.

    Raises:
        ValueError: for readers that are not later layers in order, and sizes that are none.
    """

    name: Name
    source: int
    readers: tuple[int, ...]
    widths: tuple[int, ...]
    unit: int
    follows_hidden: bool = False
    readers_copy: bool = False

    def __post_init__(self) -> None:
        if not self.readers or list(self.readers) != sorted(set(self.readers)) or self.readers[0] <= self.source:
            raise ValueError(
                f"{self.name}: made by layer {self.source}, its readers must be later ones: {self.readers}"
            )
        if self.unit < 1 or not self.widths or min(self.widths) < 0:
            raise ValueError(f"{self.name}: widths {self.widths} of {self.unit} elements are no sizes")

    def __hash__(self) -> int:
        # Asked for with every payload; names are unique.
        return hash(self.name)


@dataclass(frozen=True, repr=False)
class Declarations:
    """All tensors that cross layers in one model; the same on every rank.

    Attributes:
        num_layers: ``N``, layers of all kinds.
        tensors: in payload order: by source, readers, and what the name is called.
        origin: what they were made from, for messages.

    Raises:
        ValueError: for layers beyond ``N``, two tensors of one name, and widths for different numbers of ranks.
    """

    num_layers: int
    tensors: tuple[CrossLayerTensor, ...]
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        in_order = tuple(sorted(self.tensors, key=lambda one: (one.source, one.readers, str(one.name))))
        object.__setattr__(self, "tensors", in_order)
        for name, count in Counter(one.name for one in self.tensors).items():
            if count > 1:
                raise ValueError(f"{name}: declared {count} times")
        for one in self.tensors:
            if one.source < 1 or one.readers[-1] > self.num_layers:
                raise ValueError(f"{one.name}: layers {one.source} to {one.readers[-1]} of {self.num_layers}")
        if len({len(one.widths) for one in self.tensors}) > 1:
            raise ValueError(f"widths for different numbers of tensor-parallel ranks: {self.tensors}")

    def __repr__(self) -> str:
        """Short, and different for different tensors: ranks compare it."""
        digest = sha256(repr(self.tensors).encode()).hexdigest()[:16]
        origin = f", of {self.origin}" if self.origin else ""
        return f"Declarations({len(self.tensors)} tensors, {digest}, of {self.num_layers} layers{origin})"

    def on_rank(self, tensor_parallel_rank: int) -> Declarations:
        """Those that there are on one tensor-parallel rank."""
        here = tuple(one for one in self.tensors if one.widths[tensor_parallel_rank])
        return replace(self, tensors=here)

    def made_by(self, layer: int) -> tuple[CrossLayerTensor, ...]:
        """What ``layer`` hands over, in order."""
        return self._of_layer.get(layer, ((), ()))[0]

    def read_by(self, layer: int) -> tuple[CrossLayerTensor, ...]:
        """What ``layer`` receives, in order."""
        return self._of_layer.get(layer, ((), ()))[1]

    def reads_within(self, layers: Collection[int]) -> Counter[Name]:
        """How many of ``layers`` read each tensor; those that none reads are left out."""
        return Counter(one.name for one in self.tensors for reader in one.readers if reader in layers)

    @cached_property
    def _of_layer(self) -> dict[int, tuple[tuple[CrossLayerTensor, ...], tuple[CrossLayerTensor, ...]]]:
        layers = {layer for one in self.tensors for layer in (one.source, *one.readers)}
        return {
            layer: (
                tuple(one for one in self.tensors if one.source == layer),
                tuple(one for one in self.tensors if layer in one.readers),
            )
            for layer in layers
        }
