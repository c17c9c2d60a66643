"""Rotary embedding's fields: ``rope_parameters`` of transformers 5, and the older ones that say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
from sla_megatron.hf.rotary_sla_gpt import SlaGPTRotaryEmbedding

from .hf_models import tiny

#: Elements of a head, and of those the ones that turn where half of them do.
DIM, HALF = 16, 8
#: Every kind of scaling, of half a head.  Numbers of positions are smaller than those of the test.
SCALING: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16},
    "longrope": {
        **{"factor": 4.0, "original_max_position_embeddings": 16},
        **{"short_factor": [1.0 + i / 9 for i in range(HALF // 2)], "long_factor": [2.0 + i for i in range(HALF // 2)]},
    },
    "llama3": {
        **{"factor": 8.0, "original_max_position_embeddings": 16},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "proportional": {"factor": 2.0},
}
THETA = 500.0


def new(kind: str) -> dict[str, Any]:
    said = {"rope_type": kind, "rope_theta": THETA, "partial_rotary_factor": 0.5, **SCALING[kind]}
    return {"rope_parameters": said}


def old(kind: str) -> dict[str, Any]:
    scaling = None if kind == "default" else {"rope_type": kind, **SCALING[kind]}
    return {"rope_theta": THETA, "rotary_percent": 0.5, "rope_scaling": scaling}


WRITTEN = {
    "old": old,
    "new": new,
    "both": lambda kind: old(kind) | new(kind),
    # What each leaves out is in the other.
    "between them": lambda kind: {
        "rope_theta": THETA,
        "rope_parameters": {"rope_type": kind, "partial_rotary_factor": 0.5, **SCALING[kind]},
    },
    "the name of transformers 4": lambda kind: {
        "partial_rotary_factor": 0.5,
        "rope_parameters": {"type": kind, "rope_theta": THETA, **SCALING[kind]},
    },
}


def ours(**fields: Any) -> SlaGPTConfig:
    return tiny(head_dim=DIM, max_position_embeddings=32, **fields)


def llama(kind: str) -> LlamaRotaryEmbedding:
    """transformers' own; Llama turns whole heads, so without scaling it gets half of one."""
    dim = HALF if kind == "default" else DIM
    said = new(kind)["rope_parameters"] | ({"partial_rotary_factor": 1.0} if kind == "default" else {})
    shape = {"hidden_size": 32, "num_attention_heads": 8, "head_dim": dim, "max_position_embeddings": 32}
    return LlamaRotaryEmbedding(LlamaConfig(**shape, rope_parameters=dict(said)))


def test_every_kind_that_transformers_computes_is_tried() -> None:
    assert set(SCALING) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("kind", SCALING)
def test_it_turns_as_llama_s_does_however_it_is_written(kind: str, written: str, tmp_path: Path) -> None:
    config = ours(**WRITTEN[written](kind))
    config.save_pretrained(tmp_path)
    file = json.loads((tmp_path / "config.json").read_text())
    # By both names, whichever it was given by.
    assert file["rope_parameters"] == new(kind)["rope_parameters"]
    expected = {name: value for name, value in old(kind).items() if value is not None}
    assert {name: file[name] for name in old(kind) if name in file} == expected
    read = SlaGPTConfig.from_pretrained(tmp_path)
    assert read.rope_parameters == file["rope_parameters"]

    # Beyond the positions of training, where dynamic scaling begins.
    positions = torch.arange(40)[None]
    x = torch.zeros(1, dtype=torch.float32)
    theirs = llama(kind)(x, positions)
    for each in (config, read):
        cos, sin = SlaGPTRotaryEmbedding(each)(x, positions)
        half = cos.shape[-1] // 2
        torch.testing.assert_close(cos[:, :, 0], theirs[0], rtol=1e-6, atol=1e-6)
        # Ours has the sign of the first element of each pair.
        torch.testing.assert_close(sin[:, :, 0] * torch.tensor([-1.0, 1.0]).repeat_interleave(half), theirs[1])


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"rotary_percent": 1.0}, "rotary_percent"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, None),
    ],
)
def test_two_names_that_say_different_things_are_refused(said: dict, named: str | None) -> None:
    if named is None:
        # Of one name alone there is no other.
        assert ours(**said).rope_theta == 1e4
        with pytest.raises(ValueError, match=r"rope_theta must not contradict rope_scaling \{[^\n]*; it is 500.0$"):
            ours(**said, rope_theta=THETA)
        return
    with pytest.raises(ValueError, match=rf"^SlaGPTConfig: {named} must not contradict rope_parameters [^\n]*; it is "):
        ours(**said, **new("linear"))


def test_what_is_set_afterwards_by_one_name_is_set_by_the_other(tmp_path: Path) -> None:
    config = ours(**new("linear"))
    config.rope_theta = 7.0
    config.rope_parameters["factor"] = 3.0
    assert config.rope_parameters == new("linear")["rope_parameters"] | {"rope_theta": 7.0, "factor": 3.0}
    assert config.rope_scaling == {"rope_type": "linear", "factor": 3.0}
    with pytest.raises(TypeError):
        config.rope_scaling["factor"] = 4.0
    # A new kind of scaling leaves nothing of the old one, and the rest as it is.
    config.rope_parameters = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    assert (config.rope_theta, config.rotary_percent) == (7.0, 0.5)
    config.rope_scaling = None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    # As from_pretrained's keywords do.
    config.save_pretrained(tmp_path)
    read = SlaGPTConfig.from_pretrained(tmp_path, rope_parameters=SCALING["linear"] | {"rope_type": "linear"})
    assert read.rope_parameters == new("linear")["rope_parameters"] | {"rope_theta": 7.0}
    # What one configuration is given is not another's.
    given = new("linear")["rope_parameters"]
    ours(rope_parameters=given).rope_theta = 1.0
    assert given["rope_theta"] == THETA


def test_a_model_without_rotary_positions_has_no_rope_parameters_in_its_file(tmp_path: Path) -> None:
    """Tools that find some take it for one of rotary positions."""
    tiny(position_embedding_type="learned_absolute").save_pretrained(tmp_path)
    assert "rope_parameters" not in json.loads((tmp_path / "config.json").read_text())
