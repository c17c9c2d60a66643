"""How Transformer Engine's attention takes what it is given to lie in memory, from strides and offsets alone.

The rule is that of ``transformer_engine.pytorch.attention.dot_product_attention.utils:get_qkv_layout`` in TE 2, for
``[s, b, heads, d]``.  Its last case asks for equal strides of keys and values, and for no strides of the queries:
one that is strided beside contiguous ones would be read as contiguous.
"""

from __future__ import annotations

import math

from torch import Tensor

#: Queries, keys and values each by itself.
APART = "sbhd_sbhd_sbhd"
#: What makes TE copy all three, and ask again.
COPIED = "not_supported"


def te_layout(query: Tensor, key: Tensor, value: Tensor) -> str:
    """The layout's name."""
    of_query, of_key, of_value = (tensor.storage_offset() for tensor in (query, key, value))
    all_in_one, with_key, key_with_value = (
        len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        for tensors in ((query, key, value), (query, key), (key, value))
    )
    heads, d = query.shape[2:]
    alike = query.shape == key.shape == value.shape and query.stride() == key.stride() == value.stride()
    if all_in_one and alike and of_query == 0:
        if (of_key, of_value) == (heads * d, 2 * heads * d):
            return "sb3hd"
        if (of_key, of_value) == (d, 2 * d):
            return "sbh3d"
    if key.shape[:3] != value.shape[:3] or key.stride() != value.stride():
        return COPIED
    start, groups = query.numel() if all_in_one else 0, key.shape[2]
    if key_with_value and of_key == start:
        if of_value == start + groups * d:
            return "sbhd_sb2hd"
        if of_value == start + d:
            return "sbhd_sbh2d"
    if all_in_one:
        in_a_row = (of_query, of_key, of_value) == (0, query.numel(), query.numel() + key.numel())
    else:
        in_a_row = of_query == of_key == of_value == 0
    of_pair = (0, query.numel()) if with_key and not all_in_one else (0, 0)
    after_key = key.numel() if key_with_value and not all_in_one else 0
    if in_a_row or (of_key, of_value) == (0, after_key) or (of_query, of_key) == of_pair:
        return APART
    return COPIED


def lies_so(layout: str, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the tensors lie as their layout's name says."""
    if layout == COPIED:
        return True
    three = {"sb3hd": (3, False), "sbh3d": (3, True)}
    if layout in three:
        return all(_lies(tensor, *three[layout]) for tensor in (query, key, value))
    two = {"sbhd_sb2hd": (2, False), "sbhd_sbh2d": (2, True), APART: (1, False)}
    return _lies(query, 1, False) and all(_lies(tensor, *two[layout]) for tensor in (key, value))


def _lies(tensor: Tensor, count: int, inner: bool) -> bool:
    """Whether it is one of ``count`` that alternate: head by head (``inner``), or position by position."""
    s, b, heads, d = tensor.shape
    expected = (b * heads * count * d, heads * count * d, count * d if inner else d, 1)
    sizes = zip(tensor.shape, tensor.stride(), expected, strict=True)
    return math.prod(tensor.shape) == 0 or all(size == 1 or stride == other for size, stride, other in sizes)
