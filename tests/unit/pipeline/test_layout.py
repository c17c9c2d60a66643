"""Layers, stages and ranks; and the layouts that Megatron makes of its settings, against ones written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.pipeline.layout import PipelineLayout

from ..strategies import layouts

# Of Megatron's own making.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# The layout by itself.


@given(st.integers(0, 12).flatmap(layouts))
def test_every_stage_has_one_place(layout: PipelineLayout) -> None:
    """Stage s is chunk ``s // P`` of rank ``s mod P``; each layer is in one stage, in order."""
    size = layout.pipeline_size
    assert layout.num_stages == size * layout.num_chunks == len(layout.stages)
    places = [(layout.rank(stage), stage // size) for stage in range(layout.num_stages)]
    assert [layout.stage(rank, chunk) for rank, chunk in places] == list(range(layout.num_stages))
    assert sorted(places) == [(rank, chunk) for rank in range(size) for chunk in range(layout.num_chunks)]
    assert [layer for stage in layout.stages for layer in stage] == list(range(1, layout.num_layers + 1))
    assert list(layout.stage_of) == list(range(1, layout.num_layers + 1))
    assert all(layer in layout.stages[stage] for layer, stage in layout.stage_of.items())


@given(st.integers(1, 4), st.data())
def test_of_sizes_holds_so_many_layers(size: int, data: st.DataObject) -> None:
    """As many layers a stage as asked for, none included."""
    chunks = data.draw(st.integers(1, 4), label="chunks")
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=size * chunks, max_size=size * chunks), label="sizes")
    layout = PipelineLayout.of_sizes(size, sizes)
    assert [len(stage) for stage in layout.stages] == sizes
    assert (layout.pipeline_size, layout.num_chunks, layout.num_layers) == (size, chunks, sum(sizes))


@pytest.mark.parametrize(
    ("size", "stages", "named"),
    [
        pytest.param(2, ((1,), (2,), (3,)), "3 virtual stages do not divide over 2 ranks", id="not-a-multiple"),
        pytest.param(2, (), "0 virtual stages", id="no-stages"),
        pytest.param(0, ((1,),), "over 0 ranks", id="no-ranks"),
        pytest.param(1, ((2, 1),), "in order", id="backwards"),
        pytest.param(2, ((1,), (3,)), "in order", id="a-layer-missing"),
        pytest.param(2, ((1, 2), (2, 3)), "in order", id="a-layer-twice"),
        pytest.param(1, ((0, 1),), "in order", id="from-0"),
    ],
)
def test_what_is_no_layout_is_refused(size: int, stages: tuple[tuple[int, ...], ...], named: str) -> None:
    """A ValueError that shows what is wrong."""
    with pytest.raises(ValueError, match=named):
        PipelineLayout(size, stages)


# Megatron's layouts.


def megatron_layout(layers: int, size: int, chunks: int | None = None, **settings: Any) -> PipelineLayout:
    """What the settings make, by way of Megatron's own configuration."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from sla_megatron.pipeline.megatron_layout import pipeline_layout

    return pipeline_layout(
        TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=size,
            virtual_pipeline_model_parallel_size=chunks,
            pipeline_dtype=torch.float32,
            **settings,
        )
    )


EMBEDDING = {"account_for_embedding_in_pipeline_split": True}
LOSS = {"account_for_loss_in_pipeline_split": True}


def first_and_last(first: int | None, last: int | None) -> dict[str, int | None]:
    """``--decoder-first-pipeline-num-layers`` and its counterpart."""
    return {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}


@pytest.mark.parametrize(
    ("layers", "size", "chunks", "settings", "sizes"),
    [
        pytest.param(5, 1, None, {}, [5], id="one-rank"),
        pytest.param(8, 4, None, {}, [2, 2, 2, 2], id="even"),
        pytest.param(8, 2, 2, {}, [2, 2, 2, 2], id="even-interleaved"),
        pytest.param(16, 4, 4, {}, [1] * 16, id="one-layer-a-stage"),
        pytest.param(7, 3, None, first_and_last(1, None), [1, 3, 3], id="first"),
        pytest.param(10, 4, None, first_and_last(None, 1), [3, 3, 3, 1], id="last"),
        pytest.param(10, 4, None, first_and_last(1, 3), [1, 3, 3, 3], id="first-and-last"),
        pytest.param(5, 2, None, first_and_last(2, 3), [2, 3], id="first-and-last-alone"),
        pytest.param(12, 4, 2, first_and_last(2, 2), [1, 2, 2, 1] * 2, id="first-and-last-interleaved"),
        pytest.param(14, 3, 2, first_and_last(6, None), [3, 2, 2] * 2, id="first-interleaved"),
        pytest.param(18, 3, 3, first_and_last(None, 6), [2, 2, 2] * 3, id="last-interleaved-all-alike"),
        pytest.param(15, 3, 3, first_and_last(None, 3), [2, 2, 1] * 3, id="last-interleaved"),
        pytest.param(7, 4, None, EMBEDDING, [1, 2, 2, 2], id="embedding"),
        pytest.param(7, 4, None, LOSS, [2, 2, 2, 1], id="loss"),
        pytest.param(6, 4, None, EMBEDDING | LOSS, [1, 2, 2, 1], id="embedding-and-loss"),
        pytest.param(2, 4, None, EMBEDDING | LOSS, [0, 1, 1, 0], id="embedding-and-loss-alone"),
        pytest.param(14, 4, 2, EMBEDDING | LOSS, [1, 2, 2, 2, 2, 2, 2, 1], id="embedding-and-loss-interleaved"),
        pytest.param(6, 2, 4, EMBEDDING | LOSS, [0, 1, 1, 1, 1, 1, 1, 0], id="both-alone-interleaved"),
        pytest.param(7, 2, 2, LOSS, [2, 2, 2, 1], id="loss-interleaved"),
    ],
)
def test_megatron_s_splits(
    megatron: None, layers: int, size: int, chunks: int | None, settings: dict[str, Any], sizes: list[int]
) -> None:
    """Even and uneven, with embedding and loss counted as layers or not."""
    assert megatron_layout(layers, size, chunks, **settings) == PipelineLayout.of_sizes(size, sizes)


@pytest.mark.parametrize(
    ("written", "size", "sizes"),
    [
        pytest.param("E|tt|tttt|ttL", 4, [0, 2, 4, 2], id="embedding-alone"),
        pytest.param("E|tt|tttt|ttL", 2, [0, 2, 4, 2], id="embedding-alone-interleaved"),
        pytest.param("Et|(tt|)*2,tL", 2, [1, 2, 2, 1], id="a-part-repeated"),
        pytest.param("E|t*3|t|L", 2, [0, 3, 1, 0], id="embedding-and-loss-alone"),
        pytest.param("Et||tt|t||L", 3, [1, 0, 2, 1, 0, 0], id="empty-stages"),
        pytest.param("Ettt|tL", 2, [3, 1], id="uneven"),
        pytest.param([["embedding", "decoder"], [], ["decoder"], ["loss"]], 2, [1, 0, 1, 0], id="a-list"),
    ],
)
def test_megatron_s_written_layouts(megatron: None, written: str | list, size: int, sizes: list[int]) -> None:
    """``--pipeline-model-parallel-layout``: the stages' decoder layers, whatever else they hold."""
    layout = megatron_layout(sum(sizes), size, pipeline_model_parallel_layout=written)
    assert layout == PipelineLayout.of_sizes(size, sizes)


@pytest.mark.parametrize(
    ("written", "size", "hidden_states"),
    [
        pytest.param(None, 3, [1, 1], id="with-the-loss"),
        pytest.param("Et|ttt|ttmmL", 3, [1, 1], id="written-with-the-loss"),
        pytest.param("Ettt|tttmm|L", 3, [1, 3], id="before-the-loss"),
        pytest.param("Et|tt|t|tt|mm|L", 3, [1, 1, 1, 1, 3], id="alone-interleaved"),
    ],
)
def test_hidden_states_of_further_tokens(
    megatron: None, written: str | None, size: int, hidden_states: list[int]
) -> None:
    """One more for each of two further tokens, on the hops behind the layers that predict them."""
    layout = megatron_layout(6, size, pipeline_model_parallel_layout=written, mtp_num_layers=2)
    assert layout.num_layers == 6
    assert [layout.hidden_states(hop) for hop in range(layout.num_stages - 1)] == hidden_states


def test_the_layers_of_a_stage_by_hand(megatron: None) -> None:
    """Chunk 0 of every rank comes before chunk 1 of any."""
    layout = megatron_layout(12, 4, 2, **first_and_last(2, 2))
    assert layout.stages == ((1,), (2, 3), (4, 5), (6,), (7,), (8, 9), (10, 11), (12,))
    assert [layout.stages[layout.stage(3, chunk)] for chunk in (0, 1)] == [(6,), (12,)]


# Of a hybrid model.

#: Pattern, P, layers of the first and the last rank where they are given.
PATTERNS: list[tuple[str, int, int | None, int | None]] = [
    ("*-*-*-*-", 1, None, None),
    ("*-*-|*-*-", 2, None, None),
    ("*-|*-|*-|*-", 2, None, None),
    ("*-*|--|-*|*-", 4, None, None),
    ("||M*|", 2, None, None),
    ("*-*-*-|-", 2, None, None),
    ("M*-E", 2, None, None),
    ("*-*-*-*-", 4, 1, 3),
    ("*-*-*-*-", 2, 3, None),
    ("*-*-*-*-", 2, None, 1),
]


@pytest.mark.parametrize(("pattern", "size", "first", "last"), PATTERNS)
def test_the_stages_of_a_pattern_are_upstreams(
    megatron_imported: None, pattern: str, size: int, first: int | None, last: int | None
) -> None:
    """Each rank's chunks, as upstream chooses them on that rank of a process group that torch pretends to have."""
    import torch
    from megatron.core.models.hybrid.hybrid_layer_allocation import select_pipeline_segment
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from sla_megatron.pipeline.megatron_layout import hybrid_layout

    layout = hybrid_layout(pattern, size, first, last)
    found = {}
    for rank in range(size):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        for chunk in range(layout.num_chunks):
            group, vp_stage = torch.distributed.group.WORLD, chunk if layout.num_chunks > 1 else None
            # The last two say which ranks log.
            kinds, offset = select_pipeline_segment(pattern, group, vp_stage, first, last, group, group)
            found[layout.stage(rank, chunk)] = tuple(range(offset + 1, offset + len(kinds) + 1))
        torch.distributed.destroy_process_group()
    assert found == dict(enumerate(layout.stages))


@pytest.mark.parametrize(
    ("pattern", "size", "first", "last", "said"),
    [
        ("*-*", 2, None, None, r"the 3 layers of '\*-\*' do not divide over 2 pipeline ranks"),
        ("*-*-", 2, 3, 2, "the -1 layers"),
        ("*|*|*", 2, None, None, "3 virtual stages do not divide over 2 ranks"),
        ("*-|*-", 2, 1, None, "says itself which layers the first and the last stage have"),
    ],
)
def test_patterns_without_such_stages(
    megatron_imported: None, pattern: str, size: int, first: int | None, last: int | None, said: str
) -> None:
    """A ValueError that shows what is wrong."""
    from sla_megatron.pipeline.megatron_layout import hybrid_layout

    with pytest.raises(ValueError, match=said):
        hybrid_layout(pattern, size, first, last)
