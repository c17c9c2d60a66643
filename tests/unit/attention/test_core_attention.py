"""--core-attention sdpa: Megatron's own local attention in values and gradients, without its score matrix."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sla_megatron.common.errors import FlagError

pytestmark = pytest.mark.usefixtures("one_rank")

SEQUENCE, BATCH, HEADS, CHANNELS = 48, 2, 4, 8


def attention(kind: str, groups: int = HEADS, mask_type: str = "causal", **changes: object) -> torch.nn.Module:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from sla_megatron.attention.core_attention import TorchAttention
    from sla_megatron.cpu.flags import CONFIG_ON_CPU

    fields = {"attention_dropout": 0.0, **CONFIG_ON_CPU} | changes
    config = TransformerConfig(
        num_layers=4,
        hidden_size=HEADS * CHANNELS,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        **fields,
    )
    made = TorchAttention if kind == "sdpa" else DotProductAttention
    return made(config, 3, AttnMaskType[mask_type], "self")


def inputs(groups: int, dtype: torch.dtype = torch.float64, sequence: int = SEQUENCE) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(sequence, BATCH, heads, CHANNELS) for heads in (HEADS, groups, groups)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def run(module: torch.nn.Module, tensors: list[Tensor], mask: Tensor | None = None) -> list[Tensor]:
    """The context, and the gradients of query, key and value of a sum with fixed weights."""
    context = module(*tensors, mask)
    weights = torch.linspace(-1, 1, context.numel(), dtype=context.dtype).view_as(context)
    return [context, *torch.autograd.grad((context * weights).sum(), tensors)]


def document_mask(sequence: int) -> Tensor:
    """As --reset-attention-mask: causal, and no token sees the document before its own; True is masked."""
    starts = torch.tensor([[0, 7, 20], [0, 30, 31]])
    place = torch.arange(sequence)
    document = (place[None, :, None] >= starts[:, None, :]).sum(-1)
    seen = (place[:, None] >= place[None, :]) & (document[:, :, None] == document[:, None, :])
    return ~seen[:, None]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("mask", ["none", "causal", "documents"])
@pytest.mark.parametrize("scaling", [False, True])
def test_values_and_gradients_are_megatrons(groups: int, mask: str, scaling: bool) -> None:
    """In fp64: the two add in other orders, and nothing else differs."""
    masks = {
        "none": None,
        "causal": torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None].expand(BATCH, -1, -1, -1),
        "documents": document_mask(SEQUENCE),
    }
    changes = {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True} if scaling else {}
    tensors = inputs(groups, torch.float32 if scaling else torch.float64)
    expected = run(attention("megatron", groups, **changes), tensors, masks[mask])
    found = run(attention("sdpa", groups, **changes), tensors, masks[mask])
    tolerance = 1e-5 if scaling else 1e-12
    for name, one, other in zip(("context", "query", "key", "value"), found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("mask_type", "masked"), [("padding", "pairs"), ("padding", "keys"), ("no_mask", "none")])
@pytest.mark.parametrize("groups", [4, 2])
def test_an_encoder_s_attention(mask_type: str, masked: str, groups: int) -> None:
    """It looks both ways, past padding: Megatron's BERT masks pairs of tokens, or keys; padding's own rows differ."""
    is_token = torch.arange(SEQUENCE) < torch.tensor([[SEQUENCE], [SEQUENCE - 20]])
    masks = {
        "none": None,
        "pairs": ~(is_token[:, None, :, None] & is_token[:, None, None, :]),
        "keys": ~is_token[:, None, None, :],
    }
    tensors, results = inputs(groups), []
    seen = torch.ones_like(is_token) if masked == "none" else is_token
    for kind in ("megatron", "sdpa"):
        context = attention(kind, groups, mask_type)(*tensors, masks[masked])[seen.T]
        weights = torch.linspace(-1, 1, context.numel(), dtype=context.dtype).view_as(context)
        results.append([context, *torch.autograd.grad((context * weights).sum(), tensors)])
    for name, expected, found in zip(("context", "query", "key", "value"), *results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    # The first query reads the last key.
    assert results[1][2][-1, 0].abs().min() > 0


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_score_matrix() -> None:
    sequence = 256
    largest = {}
    for kind in ("megatron", "sdpa"):
        with Largest() as mode:
            run(attention(kind), inputs(HEADS, torch.float32, sequence))
        largest[kind] = mode.numel
    assert largest["megatron"] >= BATCH * HEADS * sequence**2
    assert largest["sdpa"] == sequence * BATCH * HEADS * CHANNELS


def test_dropout_draws_from_the_ranks_own_state() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    module = attention("sdpa", attention_dropout=0.5)
    tensors = inputs(HEADS, torch.float32)
    states = get_cuda_rng_tracker().get_states()
    outside = torch.get_rng_state()
    first = run(module, tensors)[0]
    assert torch.equal(torch.get_rng_state(), outside)
    assert not torch.equal(run(module, tensors)[0], first)
    get_cuda_rng_tracker().set_states(states)
    assert torch.equal(run(module, tensors)[0], first)
    module.eval()
    assert torch.equal(run(module, tensors)[0], run(attention("sdpa"), tensors)[0])


ACCEPTED = {
    "core_attention": "sdpa",
    "transformer_impl": "local",
    "context_parallel_size": 2,
    "cp_comm_type": ["p2p"],
    "window_size": None,
    "softmax_type": "vanilla",
    "multi_latent_attention": False,
    "reset_attention_mask": False,
    "reset_position_ids": False,
    "create_attention_mask_in_dataloader": True,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("transformer_impl", "transformer_engine", "--transformer-impl transformer_engine: expected local"),
        ("cp_comm_type", ["a2a"], "--cp-comm-type a2a: expected all_gather"),
        (
            "hierarchical_context_parallel_sizes",
            [2, 1],
            "--hierarchical-context-parallel-sizes 2 1: expected one level",
        ),
        ("hybrid_context_parallel", True, "--hybrid-context-parallel True: expected no --hybrid-context-parallel"),
        ("window_size", (3, 0), "--window-size 3 0: expected no --window-size"),
        ("softmax_type", "learnable", "--softmax-type learnable: expected vanilla"),
        ("multi_latent_attention", True, "--multi-latent-attention True: expected no multi-latent attention"),
    ],
)
def test_what_it_cannot_do(name: str, value: object, message: str) -> None:
    from sla_megatron.flags.core_attention import resolve_core_attention

    with pytest.raises(FlagError) as error:
        resolve_core_attention(Namespace(**ACCEPTED | {name: value}))
    assert message in str(error.value)


def test_a_mask_is_made_only_where_it_says_something() -> None:
    from sla_megatron.flags.core_attention import resolve_core_attention

    megatrons = {"core_attention": "megatron", "context_parallel_size": 1}
    for changes, made in [({}, False), ({"reset_attention_mask": True}, True), (megatrons, True)]:
        args = Namespace(**ACCEPTED | changes)
        resolve_core_attention(args)
        assert args.create_attention_mask_in_dataloader == made


def test_specs_with_another_core_attention_are_refused() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from sla_megatron.attention.core_attention import TorchAttention
    from sla_megatron.model.layer_specs import torch_attention_spec

    spec = get_gpt_layer_local_spec()
    ours = torch_attention_spec(spec)
    assert ours.submodules.self_attention.submodules.core_attention is TorchAttention
    assert spec.submodules.self_attention.submodules.core_attention is not TorchAttention
    with pytest.raises(ValueError, match="this layer spec has TorchAttention in its place"):
        torch_attention_spec(ours)


def packed_params(sequence: int, layout: str) -> object:
    """The documents of :func:`document_mask`, counted over both samples."""
    from megatron.core.packed_seq_params import PackedSeqParams

    starts = torch.tensor([0, 7, 20, sequence, sequence + 30, sequence + 31, 2 * sequence], dtype=torch.int32)
    return PackedSeqParams(qkv_format=layout, cu_seqlens_q=starts, cu_seqlens_kv=starts)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("layout", ["sbhd", "thd"])
def test_documents_without_a_mask(layout: str, groups: int) -> None:
    """As Megatron's own attention with the mask of --reset-attention-mask, of samples that are cut in other places."""
    tensors = inputs(groups)
    context, *gradients = run(attention("megatron", groups), tensors, document_mask(SEQUENCE))
    packed = packed_params(SEQUENCE, layout)
    module = attention("sdpa", groups)
    # One sample after the other, [t, heads, d], where Transformer Engine's layout is asked for.
    given = [tensor.transpose(0, 1).flatten(0, 1) if layout == "thd" else tensor for tensor in tensors]
    found = module(*given, None, packed_seq_params=packed)
    if layout == "thd":
        found = found.view(BATCH, SEQUENCE, -1).transpose(0, 1)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    for one, other in zip(
        (found, *torch.autograd.grad((found * weights).sum(), tensors)), (context, *gradients), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("first", "last"), [(20, 33), (20, 48), (16, 32)])
def test_later_queries_without_a_mask_of_all(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """What a context-parallel rank computes: queries ``first .. last - 1`` over all keys before them, 8 at a time."""
    from sla_megatron.attention import core_attention
    from sla_megatron.attention.stretches import Stretch

    monkeypatch.setattr(core_attention, "_ROWS", 8)
    query, key, value = inputs(2)
    expected = run(attention("megatron", 2), [query, key, value])
    module = attention("sdpa", 2)
    weights = torch.linspace(-1, 1, expected[0].numel(), dtype=query.dtype).view_as(expected[0])[first:last]
    stretch = Stretch(slice(0, last - first), slice(0, last))
    with Largest() as mode:
        found = module._stretch(query[first:last], key, value, stretch).flatten(2)
        torch.autograd.grad((found * weights).sum(), [query, key, value])
    torch.testing.assert_close(found, expected[0][first:last], rtol=1e-12, atol=1e-12)
    # Neither scores nor a mask of all queries and keys.
    assert mode.numel <= query.numel()
