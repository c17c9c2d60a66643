"""Layers of a hybrid pattern, their numbers and their stages, against Megatron's own reading of patterns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sla_megatron.attention.numbering import LayerNumbers
from sla_megatron.common.patterns import attention_layers, kinds, segments
from sla_megatron.pipeline.layout import PipelineLayout
from sla_megatron.pipeline.megatron_layout import hybrid_layout

SEGMENTS = st.text(alphabet="*-EMG", max_size=6)


def upstreams_stages(pattern: str, size: int, first: int | None, last: int | None) -> list[tuple[str, int]]:
    """(layers, offset) of each virtual stage, as every rank of a pipeline is told by Megatron."""
    from megatron.core.models.hybrid import hybrid_layer_allocation as upstream

    chunks = (pattern.count("|") + 1) // size if "|" in pattern else 1
    found = []
    for chunk in range(chunks):
        for rank in range(size):
            # Its process groups are asked for nothing else.
            distributed = SimpleNamespace(
                get_rank=lambda group, rank=rank: rank, get_world_size=lambda group: size, ProcessGroup=Any
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(upstream, "torch", SimpleNamespace(distributed=distributed))
                for name in ("log_single_rank", "log_on_each_pipeline_stage"):
                    patch.setattr(upstream, name, lambda *args, **kwargs: None)
                stage = chunk if chunks > 1 else None
                layers, offset = upstream.select_pipeline_segment(pattern, object(), stage, first, last)
            found.append(("".join(layers), offset))
    return found


@given(st.data())
def test_stages_are_upstreams(megatron_imported: None, data: st.DataObject) -> None:
    """With ``|``, even, and with sizes given for the first and the last rank; empty stages too."""
    size = data.draw(st.integers(1, 4), label="size")
    first = last = None
    if data.draw(st.booleans(), label="with stage ends"):
        chunks = data.draw(st.integers(1, 3), label="chunks")
        assume(size * chunks > 1)
        pattern = "|".join(data.draw(st.lists(SEGMENTS, min_size=size * chunks, max_size=size * chunks)))
    else:
        ends = st.none() | st.integers(1, 4) if size > 2 else st.none()
        first, last = data.draw(ends, label="first"), data.draw(ends, label="last")
        ranks = size - sum(end is not None for end in (first, last))
        each = data.draw(st.integers(1, 3), label="each")
        total = each * ranks + (first or 0) + (last or 0)
        pattern = data.draw(st.text(alphabet="*-EMG", min_size=total, max_size=total), label="pattern")
    layout = hybrid_layout(pattern, size, first, last)
    expected = upstreams_stages(pattern, size, first, last)
    assert [(len(layers), offset) for layers, offset in expected] == [
        (len(stage), sum(map(len, layout.stages[:number]))) for number, stage in enumerate(layout.stages)
    ]
    assert "".join(layers for layers, _ in expected) == kinds(pattern)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(("*-*", 2), "3 layers of '\\*-\\*' do not divide over 2", id="odd"),
        pytest.param(("*-|*-|*-", 2), "3 virtual stages do not divide", id="segments"),
        pytest.param(("*-|*-", 2, 2), "says itself which layers", id="ends-and-sizes"),
        pytest.param(("*-*-", 2, 3, 3), "do not divide", id="too-many"),
        pytest.param(("*-*-", 2, 1, 1), "do not divide", id="some-left-over"),
    ],
)
def test_what_does_not_divide_is_refused(arguments: tuple[Any, ...], named: str) -> None:
    """In one line; upstream would leave out the layers in the middle in the last case."""
    with pytest.raises(ValueError, match=named):
        hybrid_layout(*arguments)


def test_layers_of_a_pattern() -> None:
    """By hand: what stands behind ``/`` predicts further tokens and is none of the model's layers."""
    assert segments("M*-|*E-|/*-/*-") == ("M*-", "*E-", "")
    assert (kinds("M*-|*E-/*-"), attention_layers("M*-|*E-/*-")) == ("M*-*E-", (2, 4))
    numbers = LayerNumbers.of_pattern("M*-|*E-/*-")
    assert (numbers, numbers.in_stack(2), numbers.among_attention(4)) == (LayerNumbers((2, 4), 6), 4, 2)
    with pytest.raises(ValueError, match=r"layer 3 is no attention layer; those are \(2, 4\)"):
        numbers.among_attention(3)
    assert LayerNumbers.of_gpt(3) == LayerNumbers.of_pattern("***") == LayerNumbers((1, 2, 3), 3)
    assert hybrid_layout("*-*-/*-", 2) == PipelineLayout(2, ((1, 2), (3, 4)))
