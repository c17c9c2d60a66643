"""Upstream's layer and block specs with skip-layer attention in them: one module swapped, the rest shared."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from sla_megatron.attention.sla_config import SLAConfig

pytestmark = pytest.mark.usefixtures("megatron")

SLA = SLAConfig(4, 4, (3,), 3)


def transformer_config(**changes: Any) -> Any:
    """A config of four layers for the local spec."""
    from megatron.core.transformer import TransformerConfig

    local = {
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**{"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, **local, **changes})


def local_spec(**options: Any) -> Any:
    """Upstream's spec of one local layer."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(**options)


def assert_only_attention_differs(ours: Any, upstream: Any) -> None:
    """``ours`` is ``upstream`` but for ``self_attention``'s module and its added parameter."""
    from megatron.core.transformer.attention import SelfAttention

    from sla_megatron.attention.self_attention import SLASelfAttention

    assert type(ours) is type(upstream) and type(ours.submodules) is type(upstream.submodules)
    for name, value in vars(upstream).items():
        assert name == "submodules" or getattr(ours, name) is value
    for name, value in vars(upstream.submodules).items():
        assert name == "self_attention" or getattr(ours.submodules, name) is value
    attention, its_upstream = ours.submodules.self_attention, upstream.submodules.self_attention
    assert (attention.module, its_upstream.module) == (SLASelfAttention, SelfAttention)
    assert attention.params == {**its_upstream.params, "sla": SLA}
    assert attention.submodules is its_upstream.submodules


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"qk_layernorm": True}, id="qk-norm"),
        pytest.param({"normalization": "RMSNorm"}, id="rmsnorm"),
        pytest.param({"num_experts": 4, "moe_grouped_gemm": False}, id="moe"),
    ],
)
def test_only_self_attention_is_swapped(options: dict[str, Any]) -> None:
    """In each kind of local layer; everything else is the same object as in upstream's spec."""
    from sla_megatron import sla_layer_spec

    upstream = local_spec(**options)
    assert_only_attention_differs(sla_layer_spec(upstream, SLA), upstream)


def test_twice_is_once() -> None:
    """A script may make the spec a skip-layer one itself; the block leaves it so, and refuses one of other settings."""
    from sla_megatron import sla_layer_spec

    ours = sla_layer_spec(local_spec(), SLA)
    assert sla_layer_spec(ours, SLAConfig(**vars_of(SLA))) is ours
    with pytest.raises(ValueError, match="this layer spec has SLASelfAttention in its place"):
        sla_layer_spec(ours, SLAConfig(**vars_of(SLA) | {"num_skip_groups": 1}))


def vars_of(sla: SLAConfig) -> dict[str, Any]:
    """Its fields, without what it has computed."""
    return {field.name: getattr(sla, field.name) for field in fields(sla)}


def test_an_encoder_s_layer() -> None:
    """BERT's, with its mask type, which stays; its core attention can be swapped too."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.transformer.enums import AttnMaskType

    from sla_megatron import sla_layer_spec
    from sla_megatron.attention.core_attention import TorchAttention
    from sla_megatron.model.layer_specs import torch_attention_spec

    assert_only_attention_differs(sla_layer_spec(bert_layer_local_spec, SLA), bert_layer_local_spec)
    both = sla_layer_spec(torch_attention_spec(bert_layer_local_spec), SLA).submodules.self_attention
    assert both.params == {"attn_mask_type": AttnMaskType.padding, "sla": SLA}
    assert both.submodules.core_attention is TorchAttention


def test_whose_block_is_swapped() -> None:
    """GPT's, or the one of the model that is given, for the length of the block; a class of no model's is refused."""
    from megatron.core.models.bert import bert_model
    from megatron.core.models.gpt import gpt_model
    from megatron.core.models.vision import clip_vit_model

    from sla_megatron import sla_transformer_blocks
    from sla_megatron.model.transformer_block import SLATransformerBlock
    from sla_megatron.upstream.seams import SeamError

    upstream = gpt_model.TransformerBlock
    models = {
        None: gpt_model,
        gpt_model.GPTModel: gpt_model,
        bert_model.BertModel: bert_model,
        clip_vit_model.CLIPViTModel: clip_vit_model,
    }
    for model, swapped in models.items():
        with sla_transformer_blocks(SLA, model):
            for module in models.values():
                found = getattr(module.TransformerBlock, "func", module.TransformerBlock)
                assert found is (SLATransformerBlock if module is swapped else upstream)
        assert all(module.TransformerBlock is upstream for module in models.values())
    with pytest.raises(SeamError, match="bert_lm_head:TransformerBlock does not exist"):
        with sla_transformer_blocks(SLA, bert_model.BertLMHead):
            pass


def test_the_spec_that_is_given_stays_as_it_was() -> None:
    """Neither it nor anything inside it is modified, so that a dense model can be built from it too."""
    from sla_megatron import sla_layer_spec

    def everything(spec: Any) -> list[dict[str, Any]]:
        attention = spec.submodules.self_attention
        parts = (spec, spec.submodules, attention, attention.submodules)
        return [*(dict(vars(part)) for part in parts), dict(attention.params)]

    upstream = local_spec()
    before = everything(upstream)
    sla_layer_spec(upstream, SLA)
    assert everything(upstream) == before


def test_a_block_with_moe_layers() -> None:
    """Every layer of a block of dense and MoE layers is swapped, in order; the final norm stays."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from sla_megatron import sla_layer_spec

    config = transformer_config(num_moe_experts=2, moe_layer_freq=[0, 1, 0, 1], moe_ffn_hidden_size=32)
    upstream = get_gpt_decoder_block_spec(config, use_transformer_engine=False, pp_rank=0)
    layers = list(upstream.layer_specs)
    ours = sla_layer_spec(upstream, SLA)
    assert type(ours) is type(upstream)
    assert ours.layer_norm is upstream.layer_norm
    for our_layer, its_upstream in zip(ours.layer_specs, layers, strict=True):
        assert_only_attention_differs(our_layer, its_upstream)
    assert len({id(layer.submodules.mlp) for layer in layers}) == 2
    assert all(now is then for now, then in zip(upstream.layer_specs, layers, strict=True))


def test_a_transformer_engine_layer() -> None:
    """Where Transformer Engine is installed, its spec is swapped in the same way."""
    pytest.importorskip("transformer_engine.pytorch")
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from sla_megatron import sla_layer_spec

    upstream = get_gpt_layer_with_transformer_engine_spec()
    assert_only_attention_differs(sla_layer_spec(upstream, SLA), upstream)


def test_multi_latent_attention_is_refused() -> None:
    """It has no K/V groups to share; the error says what was expected and what was found."""
    from sla_megatron import sla_layer_spec

    with pytest.raises(ValueError, match=r"replaces .*\.SelfAttention; this layer spec has MLASelfAttention"):
        sla_layer_spec(local_spec(multi_latent_attention=True), SLA)


def test_one_unsuitable_layer_refuses_the_block() -> None:
    """A block is not swapped in part."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from sla_megatron import sla_layer_spec

    block = TransformerBlockSubmodules(layer_specs=[local_spec(), local_spec(multi_latent_attention=True)])
    with pytest.raises(ValueError, match="MLASelfAttention"):
        sla_layer_spec(block, SLA)


@pytest.mark.parametrize("attention", ["IdentityOp", "CrossAttention", "SLASelfAttention"])
def test_other_attention_is_refused(attention: str) -> None:
    """No attention, another one, or one that was swapped already: the error names it."""
    from megatron.core.transformer.attention import CrossAttention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec

    from sla_megatron import sla_layer_spec
    from sla_megatron.attention.self_attention import SLASelfAttention

    found = {
        "IdentityOp": IdentityOp,
        "CrossAttention": ModuleSpec(module=CrossAttention),
        "SLASelfAttention": ModuleSpec(module=SLASelfAttention),
    }
    spec = local_spec()
    spec.submodules.self_attention = found[attention]
    with pytest.raises(ValueError, match=f"has {attention} in its place"):
        sla_layer_spec(spec, SLA)


def test_a_changed_upstream_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new parameter of the one method that is overridden raises, rather than being dropped."""
    from megatron.core.transformer.attention import SelfAttention

    from sla_megatron import sla_layer_spec
    from sla_megatron.upstream.seams import SeamError

    def changed(self, hidden_states, key_value_states=None, output_gate=False, split_qkv=True, new=None): ...

    monkeypatch.setattr(SelfAttention, "get_query_key_value_tensors", changed)
    with pytest.raises(SeamError, match="get_query_key_value_tensors has parameters .*'new'"):
        sla_layer_spec(local_spec(), SLA)
