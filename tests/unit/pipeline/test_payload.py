"""The sizes of what crosses a hop, against the spec's sums."""

from __future__ import annotations

from fractions import Fraction
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.pipeline.declarations import CrossLayerTensor
from sla_megatron.pipeline.payload import Columns, MicrobatchShape

from ..strategies import SLAPlan, route_plans


@st.composite
def shapes(draw: st.DrawFn) -> MicrobatchShape:
    """Any sizes in which C divides the sequence, and with sequence parallelism T as well."""
    tensor, context, sequence = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.booleans())
    return MicrobatchShape(
        sequence_length=draw(st.integers(1, 50)) * context * (tensor if sequence else 1),
        microbatch_size=draw(st.integers(1, 8)),
        hidden_size=draw(st.integers(1, 4096)),
        tensor_parallel_size=tensor,
        context_parallel_size=context,
        sequence_parallel=sequence,
    )


def hidden_bound(shape: MicrobatchShape) -> Fraction:
    """``(q/C) * b * hidden``, divided by T with sequence parallelism."""
    elements = Fraction(shape.sequence_length, shape.context_parallel_size) * shape.microbatch_size * shape.hidden_size
    return elements / shape.tensor_parallel_size if shape.sequence_parallel else elements


def bound(shape: MicrobatchShape, width: int, unit: int, follows_hidden: bool) -> Fraction:
    """``(q/C) * b * width * unit``: the same with sequence parallelism as without, unless it follows hidden states."""
    elements = Fraction(shape.sequence_length, shape.context_parallel_size) * shape.microbatch_size * width * unit
    return elements / shape.tensor_parallel_size if follows_hidden and shape.sequence_parallel else elements


#: Width, unit, and whether it follows the hidden states, of each of some tensors.
Sizes = list[tuple[int, int, bool]]
SIZES = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 256), st.booleans()), max_size=4)


def tensors_of(sizes: Sizes) -> list[CrossLayerTensor]:
    """Of these sizes on the second of two ranks."""
    return [CrossLayerTensor(i, 1, (2,), (5, width), unit, follows) for i, (width, unit, follows) in enumerate(sizes)]


@given(shapes(), SIZES)
def test_the_payload_is_the_lower_bound(shape: MicrobatchShape, sizes: Sizes) -> None:
    """Hidden states and what crosses layers, not one element more."""
    columns = Columns.of(tensors_of(sizes), 1)
    expected = sum(bound(shape, *size) for size in sizes)
    assert shape.hidden_elements == hidden_bound(shape)
    assert shape.elements(columns) == expected
    assert shape.payload_elements(columns) == hidden_bound(shape) + expected


@given(shapes(), SIZES)
def test_the_payload_s_shape_is_the_hidden_states_made_wider(shape: MicrobatchShape, sizes: Sizes) -> None:
    """Same sequence and microbatch; the width is a whole number and leaves no element out."""
    tensors = tensors_of(sizes)
    columns = Columns.of(tensors, 1)
    hidden, payload = shape.hidden_shape, shape.payload_shape(columns)
    assert payload[:2] == hidden[:2]
    assert prod(hidden) == shape.hidden_elements
    assert prod(payload) == shape.payload_elements(columns)
    # Of the whole sequence: with sequence parallelism they widen its T-th part by T times as much.
    times = shape.tensor_parallel_size if shape.sequence_parallel else 1
    widths = [width * unit * (1 if follows else times) for width, unit, follows in sizes]
    assert payload[2] == shape.hidden_size + sum(widths)
    for tensor, (width, unit, follows) in zip(tensors, sizes, strict=True):
        positions = hidden[0] * (1 if follows else times)
        assert shape.tensor_shape(tensor, 1) == (positions, hidden[1], width, unit)


@given(route_plans(), shapes())
def test_the_payload_of_a_hop_is_a_sum_over_what_crosses(plan: SLAPlan, shape: MicrobatchShape) -> None:
    """On each tensor-parallel rank: one term for every key and value of its own groups that crosses the hop."""
    for hop in range(plan.layout.num_stages - 1):
        for rank in range(plan.tensor_parallel_size):
            own = plan.sla.rank_groups(plan.tensor_parallel_size, rank)
            # Of one channel.
            terms = [bound(shape, 1, 1, False) for _, _, group in plan.crossing(hop) if group in own]
            elements = shape.payload_elements(plan.plan.hop_columns(hop, rank))
            assert elements == hidden_bound(shape) + sum(terms)


@pytest.mark.parametrize(
    ("sequence_parallel", "hidden", "payload"),
    [(False, (512, 2, 768), (512, 2, 768 + 384)), (True, (128, 2, 768), (128, 2, 768 + 4 * 384))],
    ids=["whole-sequence", "sequence-parallel"],
)
def test_by_hand(sequence_parallel: bool, hidden: tuple[int, ...], payload: tuple[int, ...]) -> None:
    """q=1024, C=2, b=2, hidden 768, T=4: keys and values of three groups of 64 cross on each rank."""
    shape = MicrobatchShape(1024, 2, 768, 4, 2, sequence_parallel)
    three = Columns(2 * 3 * 64)
    assert (shape.hidden_shape, shape.payload_shape(three)) == (hidden, payload)
    assert shape.payload_shape(Columns()) == hidden
    assert shape.elements(three) == 2 * 512 * 2 * 3 * 64
