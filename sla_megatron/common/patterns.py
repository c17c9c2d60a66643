"""Patterns of layers, as ``--hybrid-layer-pattern`` has them: one symbol a layer.  Pure Python, no Megatron.

``*`` is attention, ``-`` MLP, ``E`` experts, ``M`` Mamba; ``|`` ends a pipeline stage, and what follows a ``/``
predicts further tokens.  Upstream's symbols are ``megatron.core.models.hybrid.hybrid_layer_allocation:Symbols``.
"""

from __future__ import annotations

ATTENTION, MLP, EXPERTS, MAMBA = "*", "-", "E", "M"
STAGE_END = "|"
FURTHER_TOKENS = "/"


def segments(pattern: str) -> tuple[str, ...]:
    """The layers of the main model, one text for each pipeline stage that ``pattern`` tells apart."""
    return tuple(pattern.split(FURTHER_TOKENS)[0].split(STAGE_END))


def kinds(pattern: str) -> str:
    """The layers of the main model, one symbol each: layer ``i`` of the stack, from 1, is ``kinds(pattern)[i - 1]``."""
    return "".join(segments(pattern))


def attention_layers(pattern: str) -> tuple[int, ...]:
    """The layers of the stack, from 1, that are attention; ``*-*-`` has 1 and 3."""
    return tuple(number for number, kind in enumerate(kinds(pattern), start=1) if kind == ATTENTION)
