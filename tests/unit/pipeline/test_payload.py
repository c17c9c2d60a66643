"""The sizes of what crosses a hop, against the spec's sums."""

from __future__ import annotations

from fractions import Fraction
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.pipeline.payload import MicrobatchShape
from sla_megatron.pipeline.routes import RoutePlan

from ..strategies import route_plans


@st.composite
def shapes(draw: st.DrawFn) -> MicrobatchShape:
    """Any sizes in which C divides the sequence, and with sequence parallelism T as well."""
    tensor, context, sequence = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.booleans())
    return MicrobatchShape(
        sequence_length=draw(st.integers(1, 50)) * context * (tensor if sequence else 1),
        microbatch_size=draw(st.integers(1, 8)),
        hidden_size=draw(st.integers(1, 4096)),
        head_size=draw(st.integers(1, 256)),
        tensor_parallel_size=tensor,
        context_parallel_size=context,
        sequence_parallel=sequence,
    )


def hidden_bound(shape: MicrobatchShape) -> Fraction:
    """``(q/C) * b * hidden``, divided by T with sequence parallelism."""
    elements = Fraction(shape.sequence_length, shape.context_parallel_size) * shape.microbatch_size * shape.hidden_size
    return elements / shape.tensor_parallel_size if shape.sequence_parallel else elements


def kv_bound(shape: MicrobatchShape) -> Fraction:
    """``2 * (q/C) * b * d``: one K/V group, the same with sequence parallelism as without."""
    return 2 * Fraction(shape.sequence_length, shape.context_parallel_size) * shape.microbatch_size * shape.head_size


@given(shapes(), st.integers(0, 64))
def test_the_payload_is_the_lower_bound(shape: MicrobatchShape, groups: int) -> None:
    """Hidden states and ``groups`` K/V groups, not one element more."""
    assert shape.hidden_elements == hidden_bound(shape)
    assert shape.kv_elements(groups) == groups * kv_bound(shape)
    assert shape.payload_elements(groups) == hidden_bound(shape) + groups * kv_bound(shape)


@given(shapes(), st.integers(0, 64))
def test_the_payload_s_shape_is_the_hidden_states_made_wider(shape: MicrobatchShape, groups: int) -> None:
    """Same sequence and microbatch; the width is a whole number and leaves no element out."""
    hidden, payload = shape.hidden_shape, shape.payload_shape(groups)
    assert payload[:2] == hidden[:2]
    assert prod(hidden) == shape.hidden_elements
    assert prod(payload) == shape.payload_elements(groups)
    # K/V are of the whole sequence: with sequence parallelism they widen its T-th part by T times as much.
    times = shape.tensor_parallel_size if shape.sequence_parallel else 1
    assert payload[2] == shape.hidden_size + times * 2 * groups * shape.head_size
    assert 2 * prod(shape.kv_shape(groups)) == shape.kv_elements(groups)
    assert shape.kv_shape(groups) == (hidden[0] * times, hidden[1], groups, shape.head_size)


@given(route_plans(), shapes())
def test_the_payload_of_a_hop_is_a_sum_over_what_crosses(plan: RoutePlan, shape: MicrobatchShape) -> None:
    """On each tensor-parallel rank: one term for every (source layer, group) of its own that crosses the hop."""
    for hop in range(plan.layout.num_stages - 1):
        for rank in range(plan.tensor_parallel_size):
            own = plan.sla.rank_groups(plan.tensor_parallel_size, rank)
            terms = [kv_bound(shape) for _, group in plan.crossing(hop) if group in own]
            assert shape.payload_elements(plan.hop_groups(hop, rank)) == hidden_bound(shape) + sum(terms)


@pytest.mark.parametrize(
    ("sequence_parallel", "hidden", "payload"),
    [(False, (512, 2, 768), (512, 2, 768 + 384)), (True, (128, 2, 768), (128, 2, 768 + 4 * 384))],
    ids=["whole-sequence", "sequence-parallel"],
)
def test_by_hand(sequence_parallel: bool, hidden: tuple[int, ...], payload: tuple[int, ...]) -> None:
    """q=1024, C=2, b=2, hidden 768, T=4: three groups of 64 cross on each rank."""
    shape = MicrobatchShape(1024, 2, 768, 64, 4, 2, sequence_parallel)
    assert (shape.hidden_shape, shape.payload_shape(3)) == (hidden, payload)
    assert shape.kv_shape(3) == (512, 2, 3, 64)
    assert shape.payload_shape(0) == hidden
    assert shape.kv_elements(3) == 2 * 512 * 2 * 3 * 64
