"""Which head goes where, against the formula that says who reads whose K/V."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from sla_megatron.attention.mixing import mix, naive
from sla_megatron.attention.mixing_plan import LayerPlan, MixingPlan, OwnHeads
from sla_megatron.attention.roles import LayerRole
from sla_megatron.attention.sla_config import KINDS, SLAConfig
from sla_megatron.pipeline.joining import joined
from sla_megatron.pipeline.runs import Run
from sla_megatron.pipeline.waiting import Microbatch
from tests.support.te_layout import APART, lies_so, te_layout

from ..strategies import sla_configs


def test_the_default_pattern() -> None:
    """NSSS NSSS NSSS: three pieces of keys and of values go from layer 1 to layer 10, as views."""
    sla = SLAConfig(12, 12, (9,), 9)
    source = LayerRole.of(sla, 1)
    own = OwnHeads.in_projection(source, 1)
    assert (own.inputs, own.query[:2], own.key[:2], own.value[:2]) == (
        (36,),
        ((0, 0), (0, 3)),
        ((0, 1), (0, 4)),
        ((0, 2), (0, 5)),
    )
    plan = LayerPlan.of(source, own, ())
    assert plan.handed_on == {("key", 1, (10,)): 3, ("value", 1, (10,)): 3} and plan.mixing.copies == ()
    assert plan.mixing.views[3:6] == tuple(Run(0, first, 3, 3 + i, 0, 1, 3) for i, first in enumerate((4, 16, 28)))
    reader = LayerPlan.of(LayerRole.of(sla, 10), own, [(3, 3, 3), (3, 3, 3)])
    assert reader.handed_on == {} and reader.mixing.views == (None, None, None)
    # A piece's gradient is a view of that of the keys or values; the projection's is written.
    views = reader.mixing.gradient_views
    assert views[0] is None and [view.source for view in views[1:]] == [1, 1, 1, 2, 2, 2]
    assert views[1].source_heads == slice(1, 4, 1)


@given(sla_configs())
def test_nothing_handed_on_lies_with_what_is_read(sla: SLAConfig) -> None:
    """Where no views may be: what attention read can be emptied, and what is on its way to later layers stays whole.

    Where they may be, a layer that reads its own K/V alone hands on what lies with them, or this would test nothing.
    """
    for layer in range(1, sla.num_layers + 1):
        role = LayerRole.of(sla, layer)
        if not role.puts:
            continue
        own = OwnHeads.in_projection(role, 1)
        # As if all groups came with each: no plan depends on more than is read.
        taken = [(sla.num_query_groups,) for _ in role.takes]
        for may_be_views in (False, True):
            plan = LayerPlan.of(role, own, taken, may_be_views)
            inputs = [torch.zeros(1, 1, heads, 3) for heads in plan.mixing.inputs]
            places = [output.untyped_storage().data_ptr() for output in mix(plan.mixing, inputs)]
            # Queries, keys and values first.
            assert set(places[:3]).isdisjoint(places[3:]) == (not may_be_views or bool(role.takes))


@given(sla_configs(), st.integers(1, 2))
def test_transformer_engine_reads_what_is_there(sla: SLAConfig, queries: int) -> None:
    """By the rule with which it takes strides for a layout, of every layer that shares: of any mixture."""
    for layer in range(1, sla.num_layers + 1):
        role = LayerRole.of(sla, layer)
        if not (role.takes or role.puts):
            continue
        own = OwnHeads.in_projection(role, queries)
        plan = LayerPlan.of(role, own, [(sla.num_query_groups,) for _ in role.takes])
        inputs = [torch.zeros(2, 2, heads, 3) for heads in plan.mixing.inputs]
        query, key, value, *_ = mix(plan.mixing, inputs)
        layout = te_layout(query, key, value)
        assert lies_so(layout, query, key, value)
        assert layout == APART or not role.takes


def test_skipv1former_hands_on_one_piece() -> None:
    """Every other value, a view; each reader copies its own keys and values and these to their places."""
    sla = SLAConfig(12, 12, (), 6, share="values", source_layers=(1,))
    role = LayerRole.of(sla, 1)
    plan = LayerPlan.of(role, OwnHeads.in_projection(role, 1), ())
    assert plan.handed_on == {("value", 1, tuple(range(2, 13))): 1} and plan.mixing.copies == ()
    # Heads q0 k0 v0 q1 k1 v1 ..: group 1's value is the sixth, group 3's the twelfth.
    assert plan.mixing.views[3] == Run(0, 5, 6, 3, 0, 1, 6)
    role = LayerRole.of(sla, 7)
    reader = LayerPlan.of(role, OwnHeads.in_projection(role, 1), [(6,)])
    assert reader.handed_on == {} and reader.mixing.views == (None, None, None)
    # Queries, keys, own values, those that it reads; the gradient of these is a view.
    assert [run.count for run in reader.mixing.copies] == [12, 12, 6, 6]
    assert reader.mixing.gradient_views == (None, Run(2, 1, 2, 1, 0, 1, 6))


def test_a_layer_between_mixes_nothing() -> None:
    role = LayerRole.of(SLAConfig(12, 12, (9,), 9), 5)
    assert not role.takes and not role.puts


def test_pruned_rows_are_queries_alone() -> None:
    """Of four groups of two query heads the first alone projects K/V."""
    own = OwnHeads.in_projection(LayerRole.of(SLAConfig(4, 4, (3,), 3, kv_projection="pruned"), 4), 2)
    assert own.inputs == (10,) and own.key == ((0, 2),) and own.value == ((0, 3),)
    assert own.query == tuple((0, i) for i in (0, 1, 4, 5, 6, 7, 8, 9))


def model_heads(sla: SLAConfig, layer: int, queries: int) -> Tensor:
    """A layer's projection, ``[1, 1, heads, 3]``: each head holds its layer, its group and its kind, K 1 and V 2."""
    heads = []
    for group in range(sla.num_query_groups):
        heads += [[layer, group, 0]] * queries
        heads += [
            [layer, group, i] for i, kind in enumerate(KINDS, start=1) if group in sla.projected_groups(layer, kind)
        ]
    return torch.tensor(heads, dtype=torch.float).reshape(1, 1, -1, 3)


@given(sla_configs(), st.integers(1, 3), st.booleans(), st.booleans())
# The last layer projects no keys, so that its values are the one tensor of its own; and the reverse.
@example(SLAConfig(4, 2, (1,), 2, None, "pruned", "keys"), 1, True, False)
@example(SLAConfig(4, 2, (1,), 2, None, "pruned", "values"), 1, True, False)
def test_every_layer_reads_the_groups_that_the_formula_names(
    sla: SLAConfig, queries: int, apart: bool, whole: bool
) -> None:
    """``apart``: keys and values come in tensors of their own; ``whole``: they pass through memory of their own."""
    every = [(layer, role) for layer in range(1, sla.num_layers + 1) for role in [LayerRole.of(sla, layer)]]
    held = Microbatch(Counter(shared for _, role in every for shared in role.takes))
    for layer, role in every:
        heads, own = OwnHeads.in_projection(role, queries), [model_heads(sla, layer, queries)]
        if apart:
            sides = [[index for _, index in side] for side in (heads.key, heads.value)]
            own = [own[0][:, :, side] for side in sides if side]
            heads = OwnHeads.apart(role)
        taken = [held.take(shared) for shared in role.takes]
        if whole:
            taken = [(tensor,) for tensor in joined(taken)]
        sizes = [[piece.shape[2] for piece in pieces] for pieces in taken]
        plan = LayerPlan.of(role, heads, sizes)
        pieces = [piece for its in taken for piece in its]
        outputs = list(mix(plan.mixing, [*own, *pieces]))
        if not apart:
            assert [row[1:] for row in outputs.pop(0)[0, 0].tolist()] == [
                [group, 0] for group in range(sla.num_query_groups) for _ in range(queries)
            ]
        key, value, *handed = outputs
        for number, kind, tensor in ((1, "key", key), (2, "value", value)):
            expected = [[sla.source_of(layer, group, kind), group, number] for group in range(sla.num_query_groups)]
            assert tensor[0, 0].tolist() == expected
        for shared, count in plan.handed_on.items():
            held.put(shared, handed[:count])
            del handed[:count]
        assert not handed
    held.require_empty()


@st.composite
def plans(draw: st.DrawFn) -> MixingPlan:
    """Any heads of any inputs in any order; some are read often, others never; empty inputs and outputs too."""
    inputs = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
    heads = st.sampled_from([(i, head) for i, size in enumerate(inputs) for head in range(size)])
    outputs = draw(st.lists(st.lists(heads, max_size=6).map(tuple), min_size=1, max_size=4))
    return MixingPlan(tuple(inputs), tuple(outputs), draw(st.booleans()))


@given(plans(), st.integers(0, 2**31))
def test_any_plan_is_as_spelled_out(plan: MixingPlan, seed: int) -> None:
    """Values, and the gradient of each input, of which all but the last have memory that was NaN before."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(2, 3, heads, 4, generator=generator, dtype=torch.float64) for heads in plan.inputs]
    found, expected = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    # ``stack`` refuses an empty list.
    filled = MixingPlan(plan.inputs, tuple(heads for heads in plan.outputs if heads))
    outputs = [output for output in mix(plan, found) if output.shape[2]]
    spelled_out = naive(filled, expected)
    for output, other in zip(outputs, spelled_out, strict=True):
        assert torch.equal(output, other)
    if not outputs:
        return
    gradients = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs]
    torch.autograd.backward(outputs, gradients)
    torch.autograd.backward(spelled_out, gradients)
    for tensor, other in zip(found, expected, strict=True):
        gradient = torch.zeros_like(other) if other.grad is None else other.grad
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-12, atol=1e-12)
