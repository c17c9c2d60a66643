"""Stacks of hybrid models: what is swapped in their specs, what is built, and how it is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sla_megatron.attention.sla_config import SLAConfig

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.filterwarnings("ignore")]

PATTERN = "*-M*E"
SLA = SLAConfig(2, 4, (1,), 3)
VOCABULARY, SEQUENCE = 32, 8
MAMBA = {"mamba_head_dim": 8, "mamba_state_dim": 16, "mamba_num_groups": 2}
EXPERTS = {"num_moe_experts": 2, "moe_ffn_hidden_size": 16, "add_bias_linear": False}


def config(num_layers: int, **settings: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    from sla_megatron.cpu.flags import CONFIG_ON_CPU

    sizes = {"num_layers": num_layers, "hidden_size": 16, "num_attention_heads": 4}
    return TransformerConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0, **CONFIG_ON_CPU | settings)


def built(pattern: str, sla: SLAConfig | None = None, *, vp_stage: int | None = None, **settings: Any) -> Any:
    """The hybrid model of ``pattern``."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from sla_megatron.model.builder import SLAHybridModelBuilder, SLAHybridModelConfig

    model = SLAHybridModelConfig(
        transformer=config(len(pattern), is_hybrid_model=True, **settings),
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
        vocab_size=VOCABULARY,
        seq_length=SEQUENCE,
        sla=sla,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return SLAHybridModelBuilder(model).build_model(groups, True, True, vp_stage)


def test_only_the_stack_is_swapped() -> None:
    """In upstream's spec and in the local one; submodules, which predict further tokens too, stay the same object."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    from sla_megatron import sla_hybrid_stack_spec
    from sla_megatron.model.hybrid_specs import local_hybrid_stack_spec
    from sla_megatron.model.hybrid_stack import SLAHybridStack

    for spec in (hybrid_stack_spec, local_hybrid_stack_spec(config(5))):
        before = (spec.module, dict(spec.params or {}), vars(spec.submodules).copy())
        ours = sla_hybrid_stack_spec(spec, SLA, PATTERN, vp_stage=1)
        assert ours.module is SLAHybridStack and ours.submodules is spec.submodules
        assert ours.params == {**before[1], "sla": SLA, "pattern": PATTERN, "vp_stage": 1}
        assert (spec.module, dict(spec.params or {}), vars(spec.submodules)) == before


def test_another_stack_or_another_number_of_layers_is_refused() -> None:
    """In words: which class was expected and found; how many attention layers."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.transformer.spec_utils import ModuleSpec

    from sla_megatron import sla_hybrid_stack_spec

    class OtherStack(HybridStack):
        """Somebody's."""

    other = ModuleSpec(OtherStack, submodules=hybrid_stack_spec.submodules)
    with pytest.raises(
        ValueError, match=r"SLAHybridStack replaces .*hybrid_block\.HybridStack; this spec has .*OtherStack in its"
    ):
        sla_hybrid_stack_spec(other, SLA, PATTERN)
    with pytest.raises(ValueError, match=r"the pattern '\*-\*-\*-' has 3 attention layers, expected 2"):
        sla_hybrid_stack_spec(hybrid_stack_spec, SLA, "*-*-*-")


def test_a_layer_of_each_kind() -> None:
    """Attention is ours, with its number among the attention layers; other layers are upstream's classes."""
    from megatron.core.ssm.mamba_layer import MambaLayer
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

    from sla_megatron.attention.self_attention import SLASelfAttention

    pruned = SLAConfig(2, 4, (1,), 4, kv_projection="pruned")
    layers = built(PATTERN, pruned, **MAMBA, **EXPERTS).decoder.layers
    kinds = [TransformerLayer, MLPLayer, MambaLayer, TransformerLayer, MoETransformerLayer]
    assert [type(layer) for layer in layers] == kinds
    assert [layer.layer_number for layer in layers] == [1, 2, 3, 4, 5]
    first, second = (layers[index].self_attention for index in (0, 3))
    assert type(first) is type(second) is SLASelfAttention
    # The second attention layer reads all of the first one's keys and values, and has queries alone.
    assert [attention.linear_qkv.weight.shape[0] for attention in (first, second)] == [48, 16]


@pytest.mark.parametrize("sla", [None, SLAConfig(3, 4, (2,), 3)], ids=["dense", "sla"])
def test_stored_as_the_gpt_is(sla: SLAConfig | None) -> None:
    """Each tensor of ``*-*-*-`` has the name, shape and type of the GPT's, but for a layer's number and the last norm's
    name."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from sla_megatron import sla_transformer_blocks

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)

    def stored(model: Any) -> dict[str, tuple]:
        state = model.sharded_state_dict(metadata={"dp_cp_group": group, "singleton_local_shards": False})
        found = [value for value in state.values() if hasattr(value, "global_shape")]
        return {value.key: tuple(getattr(value, name, None) for name in ("global_shape", "dtype")) for value in found}

    def renamed(key: str) -> str:
        before, _, rest = key.replace("final_layernorm", "final_norm").partition("decoder.layers.")
        number, _, inside = rest.partition(".")
        if not rest:
            return before
        return f"decoder.layers.{2 * int(number) + (not inside.startswith('self_attention'))}.{inside}"

    apart = config(3, hetereogenous_dist_checkpoint=True)
    with sla_transformer_blocks(sla):
        gpt = GPTModel(apart, get_gpt_layer_local_spec(), VOCABULARY, SEQUENCE, position_embedding_type="rope")
    expected = {renamed(key): value for key, value in stored(gpt).items() if "_extra_state" not in key}
    found = {key: value for key, value in stored(built("*-*-*-", sla)).items() if "_extra_state" not in key}
    assert len(found) == 3 * 12 + 4
    assert found == expected


def test_mamba_layers_without_their_kernels() -> None:
    """The parameters that transformers' Mamba-2 has, by name, shape and type; and running them is refused in words."""
    from megatron.core.ssm import mamba_mixer
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    if mamba_mixer.HAVE_MAMBA_SSM:
        pytest.skip("mamba_ssm is here")
    theirs = Mamba2Mixer(
        Mamba2Config(hidden_size=16, head_dim=8, num_heads=4, state_size=16, n_groups=2, expand=2, conv_kernel=4), 0
    )
    expected = {name.replace("conv1d.", "conv1d_"): value.shape for name, value in theirs.named_parameters()}
    model = built("M*-M*-", SLA, **MAMBA)
    mixers = [layer.mixer for layer in model.decoder.layers if hasattr(layer, "mixer")]
    assert len(mixers) == 2
    for mixer in mixers:
        assert {name: value.shape for name, value in mixer.named_parameters()} == expected
    # Upstream's module is as it was.
    assert mamba_mixer.HAVE_MAMBA_SSM is mamba_mixer.HAVE_EINOPS is False
    tokens = torch.zeros(1, SEQUENCE, dtype=torch.long)
    with pytest.raises(RuntimeError, match="Mamba layers run where the packages mamba_ssm, causal_conv1d and einops"):
        model(tokens, tokens, None)


def test_a_stage_without_layers_returns_no_input() -> None:
    """Upstream's schedules empty what a stage returned; its own stack, a control, returns what arrived."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.process_groups_config import ProcessGroupCollection

    from sla_megatron.model.hybrid_specs import local_hybrid_stack_spec
    from sla_megatron.model.hybrid_stack import NormedHybridStack

    arrived = torch.randn(SEQUENCE, 1, 16, requires_grad=True)
    groups, settings = ProcessGroupCollection.use_mpu_process_groups(), config(2)
    ends = {"pre_process": False, "post_process": False, "layer_type_list": [], "pg_collection": groups}
    returned = {}
    for stack in (HybridStack, NormedHybridStack):
        block = stack(settings, submodules=local_hybrid_stack_spec(settings).submodules, **ends)
        block.set_input_tensor(arrived)
        returned[stack] = block(None, None)
    assert returned[HybridStack] is arrived
    assert returned[NormedHybridStack] is not arrived
    assert torch.equal(returned[NormedHybridStack], arrived)


def test_layers_share_what_is_declared() -> None:
    """A value residual, of which neither the stack nor what carries it knows: the loss and gradients of the GPT's."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from examples.value_residual.model import value_residual, with_value_residual
    from sla_megatron.model.hybrid_specs import local_hybrid_stack_spec
    from sla_megatron.model.hybrid_stack import cross_layer_hybrid_stack_spec
    from sla_megatron.pipeline.declarations import CrossLayerTensor, Declarations

    pattern, settings = "*-*-*-", config(6, is_hybrid_model=True)
    first = CrossLayerTensor("first values", source=1, readers=(3, 5), widths=(4,), unit=4)
    local = local_hybrid_stack_spec(settings)
    ours = replace(local.submodules, attention_layer=with_value_residual(local.submodules.attention_layer))
    spec = cross_layer_hybrid_stack_spec(replace(local, submodules=ours), Declarations(6, (first,)), pattern)
    torch.manual_seed(3)
    hybrid = HybridModel(settings, spec, VOCABULARY, SEQUENCE, hybrid_layer_pattern=pattern)
    with value_residual(config(3)):
        gpt = GPTModel(config(3), get_gpt_layer_local_spec(), VOCABULARY, SEQUENCE, position_embedding_type="none")
    # Both have the same parameters, in the same order.
    for theirs, mine in zip(gpt.parameters(), hybrid.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(5))
    losses = [model(tokens, None, None, labels=tokens.roll(1)).mean() for model in (gpt.train(), hybrid.train())]
    sum(losses).backward()
    assert losses[0] == losses[1]
    for theirs, mine in zip(gpt.parameters(), hybrid.parameters(), strict=True):
        assert torch.equal(theirs.grad, mine.grad)
