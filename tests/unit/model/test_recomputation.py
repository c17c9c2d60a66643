"""What goes into and out of each recomputed chunk, with gradients: of layers that are no attention at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sla_megatron.pipeline.declarations import CrossLayerTensor, Declarations
from sla_megatron.pipeline.waiting import hand_over, microbatch, receive

WIDTH = 3


class Layer(torch.nn.Module):
    """Adds what it reads of others to hidden states ``[s, b, h]``, and hands on products of them and its weight."""

    def __init__(self, number: int, declared: Declarations) -> None:
        super().__init__()
        self.layer_number, self.declared = number, declared
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, WIDTH) / number)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        for one in self.declared.read_by(self.layer_number):
            hidden_states = hidden_states + receive(one.name).squeeze(2).sin()
        hidden_states = (hidden_states * self.weight).tanh()
        for i, one in enumerate(self.declared.made_by(self.layer_number), start=1):
            hand_over(one.name, (hidden_states * self.weight * i).unsqueeze(2))
        return hidden_states, None


@st.composite
def declarations(draw: st.DrawFn) -> Declarations:
    """Up to four tensors of up to six layers, of any sources and readers."""
    num_layers = draw(st.integers(2, 6))
    tensors = []
    for i in range(draw(st.integers(1, 4))):
        source = draw(st.integers(1, num_layers - 1))
        readers = draw(st.sets(st.integers(source + 1, num_layers), min_size=1))
        tensors.append(CrossLayerTensor(f"t{i}", source, tuple(sorted(readers)), (1,), WIDTH))
    return Declarations(num_layers, tuple(tensors))


def gradients(declared: Declarations, method: str | None, chunk: int) -> list[Tensor]:
    """The output, and gradients of input and weights: by recomputation of chunks, or in one graph."""
    from sla_megatron.model import recomputation

    layers = [Layer(number, declared) for number in range(1, declared.num_layers + 1)]
    uses = declared.reads_within(range(1, declared.num_layers + 1))
    block = SimpleNamespace(layers=layers, declared=declared, uses=uses, pg_collection=SimpleNamespace(tp=None))
    block.config = SimpleNamespace(
        recompute_method=method, recompute_num_layers=chunk, distribute_saved_activations=False, fp8=None, fp4=None
    )
    hidden_states = start = torch.linspace(-1, 1, 4 * 2 * WIDTH).view(4, 2, WIDTH).requires_grad_()
    with microbatch(uses):
        if method is None:
            for layer in layers:
                hidden_states, _ = layer(hidden_states)
        else:
            hidden_states = recomputation.checkpointed_forward(
                block, hidden_states, None, None, None, None, None, None, False
            )
    hidden_states.pow(2).sum().backward()
    return [hidden_states.detach(), start.grad, *(layer.weight.grad for layer in layers)]


@given(declarations(), st.sampled_from(["uniform", "block"]), st.integers(1, 4))
def test_recomputed_chunks_have_the_gradients_of_one_graph(
    one_rank: None, declared: Declarations, method: str, chunk: int
) -> None:
    """Read in several chunks, in the chunk that makes it too, or within one alone."""
    for found, expected in zip(gradients(declared, method, chunk), gradients(declared, None, 0), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("readers", [(2, 3, 4, 5, 6), (2, 6), (5, 6)], ids=str)
@pytest.mark.parametrize(("method", "chunk"), [("uniform", 1), ("uniform", 2), ("uniform", 4), ("block", 3)])
def test_one_source_of_several_readers(one_rank: None, readers: tuple[int, ...], method: str, chunk: int) -> None:
    """Alone in its chunk, with some of its readers, with chunks between that read nothing: twice the same bits."""
    declared = Declarations(6, (CrossLayerTensor("one", 1, readers, (1,), WIDTH),))
    found, again = (gradients(declared, method, chunk) for _ in range(2))
    for one, other in zip(found, gradients(declared, None, 0), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_a_chunk_takes_and_leaves_a_tensor_once(one_rank: None) -> None:
    """However many of its layers read it: as one argument, and one result, of its checkpoint."""
    from sla_megatron.model.recomputation import _crossing

    declared = Declarations(8, (CrossLayerTensor("one", 2, (3, 4, 5, 6, 8), (1,), WIDTH),))
    layers = [SimpleNamespace(layer_number=number) for number in range(1, 9)]
    block = SimpleNamespace(declared=declared, uses=declared.reads_within(range(1, 9)))
    halves = [layers[:4], layers[4:]]
    assert [_crossing(block, half) for half in halves] == [([], ["one"]), (["one"], [])]
    assert [_crossing(block, [layer]) for layer in layers] == [
        ([], []),
        ([], ["one"]),
        *[(["one"], [])] * 4,
        ([], []),
        (["one"], []),
    ]
    assert _crossing(block, layers) == ([], [])
