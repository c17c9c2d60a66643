"""What is declared of tensors that cross layers: what is refused, in what order it is, and what ranks compare."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.attention.declared import declare
from sla_megatron.attention.numbering import LayerNumbers
from sla_megatron.attention.sla_config import SLAConfig
from sla_megatron.pipeline.declarations import CrossLayerTensor, Declarations

from ..strategies import sla_configs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, (), (1,), 1), r"v: made by layer 2, its readers must be later ones: \(\)"),
        ((2, (2, 3), (1,), 1), r"readers must be later ones: \(2, 3\)"),
        ((2, (4, 3), (1,), 1), r"readers must be later ones: \(4, 3\)"),
        ((2, (3, 3), (1,), 1), r"readers must be later ones: \(3, 3\)"),
        ((2, (3,), (), 1), r"v: widths \(\) of 1 elements are no sizes"),
        ((2, (3,), (1, -1), 1), r"v: widths \(1, -1\)"),
        ((2, (3,), (1,), 0), r"of 0 elements"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossLayerTensor("v", *arguments)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("v", 1, (2,), (1,)), ("v", 2, (3,), (1,))], "v: declared 2 times"),
        ([("v", 1, (5,), (1,))], "v: layers 1 to 5 of 4"),
        ([("v", 0, (2,), (1,))], "v: layers 0 to 2 of 4"),
        ([("v", 1, (2,), (1,)), ("w", 1, (2,), (1, 1))], "widths for different numbers of tensor-parallel ranks"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(tensors: list[tuple], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Declarations(4, tuple(CrossLayerTensor(*each, 1) for each in tensors))


def test_order_and_what_layers_do() -> None:
    """By source, readers and name, however they are given; a rank leaves out what it has nothing of."""
    far, near = CrossLayerTensor("a", 1, (3, 4), (1, 0), 2), CrossLayerTensor("b", 1, (2, 4), (1, 2), 2)
    late = CrossLayerTensor("c", 2, (4,), (0, 1), 2)
    declared = Declarations(4, (late, far, near))
    assert declared.tensors == (near, far, late)
    assert declared == Declarations(4, (near, late, far))
    assert declared.made_by(1) == (near, far) and declared.made_by(3) == ()
    assert declared.read_by(4) == (near, far, late) and declared.read_by(1) == ()
    assert declared.on_rank(0).tensors == (near, far) and declared.on_rank(1).tensors == (near, late)
    assert declared.reads_within((3, 4)) == {"a": 2, "b": 1, "c": 1}


def test_ranks_see_a_difference() -> None:
    """What they compare is short, equal for equal declarations, and different for any other size."""
    one = CrossLayerTensor("v", 1, (2, 3), (1,), 8)
    others = [
        CrossLayerTensor("v", 1, (2, 3), (1,), 4),
        CrossLayerTensor("v", 1, (2, 3), (1,), 8, follows_hidden=True),
        CrossLayerTensor("v", 1, (3,), (1,), 8),
    ]
    texts = [repr(Declarations(4, (each,))) for each in (one, *others)]
    assert len(set(texts)) == 4 and max(map(len, texts)) < 100
    assert texts[0] == repr(Declarations(4, (CrossLayerTensor("v", 1, (2, 3), (1,), 8),)))
    assert "of a model" in repr(Declarations(4, (one,), origin="a model"))


@given(sla_configs(st.sampled_from([4, 8])), st.sampled_from([1, 2, 4]), st.text("*-EM", max_size=20))
def test_skip_layer_attention_declares_what_its_layers_read(sla: SLAConfig, size: int, others: str) -> None:
    """Each (layer, group) that reads another layer's key, or value, is in it once, in numbers of the stack."""
    pattern, left = "", sla.num_layers
    for kind in others.replace("*", "*-"):
        pattern, left = (pattern, left) if kind == "*" and not left else (pattern + kind, left - (kind == "*"))
    pattern += "*" * left
    stack = [number for number, kind in enumerate(pattern, start=1) if kind == "*"]
    declared = declare(sla, LayerNumbers.of_pattern(pattern), size, 16)
    assert declared.num_layers == len(pattern)
    found: dict[tuple[str, int, int, int], int] = {}
    for tensor in declared.tensors:
        assert (tensor.unit, tensor.follows_hidden, tensor.readers_copy) == (16, False, True)
        for reader in tensor.readers:
            for rank, width in enumerate(tensor.widths):
                where = (tensor.name.kind, tensor.source, reader, rank)
                found[where] = found.get(where, 0) + width
    expected: dict[tuple[str, int, int, int], int] = dict.fromkeys(found, 0)
    for layer in range(1, sla.num_layers + 1):
        for group in range(sla.num_query_groups):
            for kind in ("key", "value"):
                source = sla.source_of(layer, group, kind)
                if source != layer:
                    where = (kind, stack[source - 1], stack[layer - 1], group * size // sla.num_query_groups)
                    expected[where] = expected.get(where, 0) + 1
    assert found == expected


#: Models and their tensors in payload order: name behind "skip-layer", source, readers, widths of two ranks.  The first
#: had them so before keys and values could be shared apart.
IN_ORDER = [
    (
        SLAConfig(8, 4, (6, 5), 3, kv_projection="pruned"),
        [
            ("keys of attention layer 1 for layer 6", 1, (6,), (0, 1)),
            ("values of attention layer 1 for layer 6", 1, (6,), (0, 1)),
            ("keys of attention layer 1 for layer 7", 1, (7,), (1, 1)),
            ("values of attention layer 1 for layer 7", 1, (7,), (1, 1)),
            ("keys of attention layer 2 for layer 7", 2, (7,), (0, 1)),
            ("values of attention layer 2 for layer 7", 2, (7,), (0, 1)),
            ("keys of attention layer 2 for layer 8", 2, (8,), (1, 1)),
            ("values of attention layer 2 for layer 8", 2, (8,), (1, 1)),
            ("keys of attention layer 3 for layer 8", 3, (8,), (0, 1)),
            ("values of attention layer 3 for layer 8", 3, (8,), (0, 1)),
        ],
    ),
    (
        SLAConfig(6, 4, (), 3, layers=(3, 5, 6), share="values", source_layers=(1, 3)),
        [
            ("values of attention layer 1 for layers 3,5,6", 1, (3, 5, 6), (1, 1)),
            ("values of attention layer 3 for layers 5,6", 3, (5, 6), (0, 1)),
        ],
    ),
    (
        SLAConfig(4, 2, (), 2, source_layers=(2,)),
        [
            ("keys of attention layer 2 for layers 3,4", 2, (3, 4), (1, 1)),
            ("values of attention layer 2 for layers 3,4", 2, (3, 4), (1, 1)),
        ],
    ),
]


@pytest.mark.parametrize(("sla", "expected"), IN_ORDER, ids=["distances", "two-sources", "one-source"])
def test_the_payload_s_order_by_hand(sla: SLAConfig, expected: list[tuple]) -> None:
    tensors = declare(sla, LayerNumbers.of_gpt(sla.num_layers), 2, 16).tensors
    found = [(str(one.name).removeprefix("skip-layer "), one.source, one.readers, one.widths) for one in tensors]
    assert found == expected


def test_a_block_refuses_widths_for_other_ranks(megatron_imported: None) -> None:
    from sla_megatron.model.crossing import CrossLayerBlock

    block = CrossLayerBlock()
    block.pg_collection, block.layers = SimpleNamespace(tp=None, pp=None), []
    block.config = SimpleNamespace(pipeline_model_parallel_size=1)
    declared = Declarations(4, (CrossLayerTensor("v", 1, (2,), (1, 1), 1),))
    with pytest.raises(ValueError, match="widths for other ranks than the 1 tensor-parallel ones"):
        block.join_pipeline(declared, lambda: None, 0)
