"""Layer ``i`` of a GPT is two layers of a hybrid model: its ``i``-th attention, and its ``i``-th MLP or experts.

Layers count from 0 here, as in the names of stored tensors.  Pure Python, no Megatron.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .patterns import ATTENTION, EXPERTS, FURTHER_TOKENS, MAMBA, MLP, kinds

#: What a hybrid model has in place of a GPT's names outside of the layers.
_LAST_NORM = {"gpt": "decoder.final_layernorm.", "hybrid": "decoder.final_norm."}

#: A name in the decoder's layers, with the layer's number or, where layers are stored as one tensor, without.  Names of
#: an optimizer's state have more before it.
_LAYER = re.compile(r"(?P<before>(?:^|.*\.)decoder\.layers\.)(?:(?P<layer>\d+)\.)?(?P<rest>.*)")

_OF_ATTENTION = ("self_attention.", "input_layernorm.")
_OF_MLP = ("mlp.", "pre_mlp_layernorm.")


@dataclass(frozen=True)
class LayerPairs:
    """Which layers of a hybrid model's stack hold the layers of a GPT.

    Attributes:
        attention: for each layer of the GPT, the one with its attention.
        mlp: the one with its MLP or experts.
        mlp_kinds: what that is, ``-`` or ``E``.
        alone: layers that a GPT has nothing of.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    mlp_kinds: str
    alone: tuple[int, ...]

    @classmethod
    def of(cls, pattern: str) -> LayerPairs:
        """Of a ``--hybrid-layer-pattern``.

        Raises:
            ValueError: for layers that are none of attention, MLP, experts and Mamba, or predict further tokens; or
                where there is not one MLP for each attention.
        """
        main = kinds(pattern)
        if FURTHER_TOKENS in pattern:
            raise ValueError(f"no layers that predict further tokens, after the {FURTHER_TOKENS} of {pattern}")
        unknown = sorted(set(main) - {ATTENTION, MLP, EXPERTS, MAMBA})
        if unknown:
            raise ValueError(f"layers of the kinds * - E M; {pattern} has {' '.join(unknown)}")
        attention, mlp, alone = (
            tuple(index for index, kind in enumerate(main) if kind in chosen)
            for chosen in (ATTENTION, (MLP, EXPERTS), MAMBA)
        )
        if len(attention) != len(mlp) or not attention:
            raise ValueError(
                f"as many attention layers (*) as MLPs (-, E), one or more; {pattern} has {len(attention)} and "
                f"{len(mlp)}"
            )
        return cls(attention, mlp, "".join(main[index] for index in mlp), alone)

    @property
    def alternate(self) -> bool:
        """Whether each attention comes right before its MLP, so that the hybrid model is the GPT."""
        return not self.alone and all(
            second == first + 1 for first, second in zip(self.attention, self.mlp, strict=True)
        )

    def to_stack(self, name: str, layer: int | None = None) -> str:
        """A GPT's stored name -> the hybrid model's.

        Args:
            name: with the layer's number or without.
            layer: the layer, where the name has none.

        Raises:
            ValueError: for a tensor that neither an attention nor an MLP layer has.
        """
        match = _LAYER.fullmatch(name)
        if match is None:
            return _with_prefix(name, _LAST_NORM["gpt"], _LAST_NORM["hybrid"])
        layer = layer if match["layer"] is None else int(match["layer"])
        if match["rest"].startswith(_OF_ATTENTION):
            return f"{match['before']}{self.attention[layer]}.{match['rest']}"
        if match["rest"].startswith(_OF_MLP):
            return f"{match['before']}{self.mlp[layer]}.{match['rest']}"
        raise ValueError(f"{name}: a tensor of neither attention nor MLP, which no layer of a hybrid model has")

    def to_gpt(self, name: str) -> str | None:
        """A hybrid model's stored name -> a GPT's with the layer's number; ``None``: a GPT has no such layer."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return _with_prefix(name, _LAST_NORM["hybrid"], _LAST_NORM["gpt"])
        index = int(match["layer"])
        for stack in (self.attention, self.mlp):
            if index in stack:
                return f"{match['before']}{stack.index(index)}.{match['rest']}"
        if index in self.alone:
            return None
        raise ValueError(f"{name}: there is no layer {index} in the pattern of this model")


def _with_prefix(name: str, old: str, new: str) -> str:
    before, found, rest = name.rpartition(old)
    return before + new + rest if found and before[-1:] in ("", ".") else name


def split_layer(name: str) -> tuple[str, int | None]:
    """``decoder.layers.3.mlp.x`` -> (``decoder.layers.mlp.x``, 3); a name without a layer's number as it is."""
    match = _LAYER.fullmatch(name)
    if match is None or match["layer"] is None:
        return name, None
    return match["before"] + match["rest"], int(match["layer"])
