"""Keys and values of different numbers of heads in transformers' caches, each of which is kept once.

Shapes: b batch, s new tokens, S all tokens (or a static cache's length), d head size, N groups of which a layer keeps
keys, or values.

A cache's layer counts its tokens by its keys and, where its size is fixed, makes values of as many heads as keys.

This file goes into exported folders: it needs torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

#: Keys and values; ``None`` for those that nothing reads.
Own = tuple[Tensor | None, Tensor | None]


def cached(cache: Cache, own: Own, layer_idx: int) -> Own:
    """New keys and values, ``[b, N, s, d]`` each with its own N, to those of all tokens, ``[b, N, S, d]``."""
    key, value = own
    if key is not None and value is not None:
        return _updated(cache, key, value, layer_idx)
    # In the place of the keys, whichever it is: by these, tokens are counted.
    only = value if key is None else key
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if hasattr(layer, "_quantized_keys"):
        # It looks for the largest of each, which nothing does not have.
        all_tokens = torch.cat(cache.update(*only.chunk(2, dim=-1), layer_idx), dim=-1)
    else:
        all_tokens, _ = _updated(cache, only, only[:, :0], layer_idx)
    return (None, all_tokens) if key is None else (all_tokens, None)


def _updated(cache: Cache, first: Tensor, second: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
    """``Cache.update``, whatever the numbers of heads."""
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    heads = first.shape[1], second.shape[1]
    if heads[0] == heads[1] or not hasattr(layer, "max_cache_len"):
        return cache.update(first, second, layer_idx)
    if not layer.is_initialized:
        _make(layer, first, second)
    # One that was made before has as many heads of both.
    room = layer.keys.shape[1], layer.values.shape[1]
    found = cache.update(_widened(first, room[0]), _widened(second, room[1]), layer_idx)
    first, second = (t if t.shape[1] == count else t.narrow(1, 0, count) for t, count in zip(found, heads, strict=True))
    return first, second


def _make(layer: Any, first: Tensor, second: Tensor) -> None:
    """The tensors of a static cache's layer, as its own ``lazy_initialization`` does for equal numbers of heads."""
    layer.lazy_initialization(first, second)
    batch, _, length, size = layer.values.shape
    layer.values = layer.values.new_zeros(batch, second.shape[1], length, size)
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(layer.values)


def _widened(x: Tensor, heads: int) -> Tensor:
    """``[b, N, s, d]`` with heads of zeros behind."""
    return x if x.shape[1] == heads else torch.nn.functional.pad(x, (0, 0, 0, 0, 0, heads - x.shape[1]))
