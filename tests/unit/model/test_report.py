"""What is said of a model at the start: which layers share what, and how many parameters are left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sla_megatron.attention.sla_config import SLAConfig

from .test_layer_specs import transformer_config

# Upstream warns of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore")

V1 = SLAConfig(12, 12, (), 6, share="values", source_layers=(1,))

LINES = {
    SLAConfig(12, 12, (9,), 9): (
        "distance 9; 9 of 12 K/V groups skip (NSSSNSSSNSSS); in layers 10-12 of 12; "
        "27 of 144 K/V projections are dead and kept"
    ),
    SLAConfig(12, 4, (2, 1), 2, (4, 6), "pruned", "keys"): (
        "distance 2 1; 2 of 4 K/V groups skip (NSNS) and share keys alone; in layers 4,6 of 12; "
        "3 of 48 K projections are dead and left out"
    ),
    V1: (
        "source layer 1; 6 of 12 K/V groups skip (NSNSNSNSNSNS) and share values alone; in layers 2-12 of 12; "
        "66 of 144 V projections are dead and kept"
    ),
    SLAConfig(12, 4, (1,), 4, (2, 4, 6, 8, 10, 12), "pruned"): (
        "distance 1; 4 of 4 K/V groups skip (SSSS); in layers 2,4,6,8,10,12 of 12; "
        "24 of 48 K/V projections are dead and left out"
    ),
    SLAConfig(4, 4, (), 4, source_layers=(1, 2)): (
        "source layer 1 2; 4 of 4 K/V groups skip (SSSS); in layers 2-4 of 4; "
        "10 of 16 K/V projections are dead and kept"
    ),
    SLAConfig(12, 12, (), 6, share="values", source_layers=(12,)): (
        "no head skips with these settings: this is the standard Transformer"
    ),
}


@pytest.mark.parametrize("sla", LINES, ids=list(map(str, range(len(LINES)))))
def test_one_line(megatron: None, sla: SLAConfig) -> None:
    from sla_megatron.attention.sla_config import describe

    assert describe(sla) == LINES[sla]
    if not sla.is_dense:
        assert describe(sla, is_hybrid=True) == LINES[sla].replace("in layers", "in attention layers")


#: Of four layers and four heads of eight channels.
MODELS: dict[str, tuple[SLAConfig, dict[str, Any]]] = {
    "distance": (SLAConfig(4, 4, (3,), 3), {}),
    "values": (SLAConfig(4, 4, (3,), 3, share="values"), {"qk_layernorm": True}),
    "keys": (SLAConfig(4, 4, (1,), 4, share="keys"), {"qk_layernorm": True}),
    "one source": (SLAConfig(4, 4, (), 2, share="values", source_layers=(1,)), {"add_bias_linear": False}),
    "of two layers": (
        SLAConfig(4, 2, (1,), 2, (2, 4)),
        {"num_query_groups": 2, "qk_layernorm": True, "normalization": "RMSNorm", "add_bias_linear": False},
    ),
    "half": (SLAConfig(4, 4, (), 4, source_layers=(2,)), {"add_bias_linear": False, "add_qkv_bias": True}),
    "two sources of keys": (SLAConfig(4, 4, (), 4, share="keys", source_layers=(1, 2)), {"qk_layernorm": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_pruned_leaves_out(one_rank: None, name: str) -> None:
    """Against the elements of a model that is built, beside the dense one's."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from sla_megatron.model.builder import SLAGPTModelBuilder, SLAGPTModelConfig
    from sla_megatron.model.parameters import pruned_parameters

    sla, changes = MODELS[name]
    elements, said = {}, {}
    for projection in ("full", "pruned"):
        config = SLAGPTModelConfig(
            transformer=transformer_config(**changes),
            vocab_size=32,
            seq_length=16,
            sla=replace(sla, kv_projection=projection),
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = SLAGPTModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
        elements[projection] = sum(parameter.numel() for parameter in model.parameters())
        said[projection] = pruned_parameters(config)
    assert said == {"full": 0, "pruned": elements["full"] - elements["pruned"]}
    assert said["pruned"] > 0
