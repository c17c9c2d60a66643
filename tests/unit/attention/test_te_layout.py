"""The rule by which Transformer Engine would read what core attention gets, on what is known of it."""

from __future__ import annotations

import pytest
import torch

from tests.support.te_layout import APART, COPIED, lies_so, te_layout

S, B, H, D = 4, 2, 3, 8


def views(*shape: int, dim: int) -> list[torch.Tensor]:
    return list(torch.randn(shape).unbind(dim))


@pytest.mark.parametrize(
    ("tensors", "layout"),
    [
        (views(S, B, H, 3, D, dim=3), "sbh3d"),
        (views(S, B, 3, H, D, dim=2), "sb3hd"),
        ([torch.randn(S, B, 2 * H, D), *views(S, B, H, 2, D, dim=3)], "sbhd_sbh2d"),
        ([torch.randn(S, B, 2 * H, D), *views(S, B, 2, H, D, dim=2)], "sbhd_sb2hd"),
        ([torch.randn(S, B, H, D) for _ in range(3)], APART),
        ([torch.randn(S, B, H, D), torch.randn(S, B, H, D), views(S, B, H, 3, D, dim=3)[2]], COPIED),
    ],
)
def test_what_lies_so(tensors: list[torch.Tensor], layout: str) -> None:
    assert te_layout(*tensors) == layout and lies_so(layout, *tensors)


def test_a_strided_query_beside_contiguous_keys_and_values_is_taken_for_contiguous() -> None:
    """The fault that ``SLASelfAttention`` must not give it the occasion for."""
    query = views(S, B, H, 3, D, dim=3)[0]
    tensors = (query, torch.randn(S, B, H, D), torch.randn(S, B, H, D))
    assert te_layout(*tensors) == APART and not lies_so(APART, *tensors)
