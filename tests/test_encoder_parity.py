"""Skip-layer attention that looks both ways: Megatron's BERT and its vision transformer against their references."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.launch import run_worker

pytestmark = pytest.mark.distributed

#: As in test_parity.py.
TOLERANCE = 1e-5

_BASE = {
    "groups": 4,
    "distances": [3],
    "skip_groups": 3,
    "projection": "full",
    "core_attention": "megatron",
    "tp": 1,
    "sequence_parallel": False,
    "recompute": "none",
    "rope": False,
    "rms_norm": False,
    "tied": False,
}
_SDPA, _TP2 = {"core_attention": "sdpa"}, {"tp": 2}
_VALUES_OF_TWO = {"distances": [], "source_layers": [1, 2], "share": "values"}
_GQA_PRUNED = {"groups": 2, "skip_groups": 2, "projection": "pruned"}
_BERT: dict[str, dict[str, Any]] = {
    "megatron": {},
    "sdpa": _SDPA,
    "megatron-tp2": _TP2,
    "sdpa-tp2": _SDPA | _TP2,
    "sdpa-tp2sp-tied": _SDPA | _TP2 | {"sequence_parallel": True, "tied": True},
    "rope-two-distances": {"rope": True, "distances": [2, 1]},
    "gqa-pruned-tp2": _GQA_PRUNED | _TP2,
    "sdpa-gqa-pruned": _SDPA | _GQA_PRUNED | {"skip_groups": 1},
    "recompute": {"recompute": "uniform2", "distances": [1]},
    "distance-beyond": {"distances": [4], "like dense": True},
    "sdpa-distance-beyond-tp2": _SDPA | _TP2 | {"distances": [5], "like dense": True},
}
#: Megatron's model has no sequence parallelism: it hands whole sequences to its block.
_VISION: dict[str, dict[str, Any]] = {
    "megatron": {},
    "sdpa-tp2": _SDPA | _TP2,
    "rms-three-distances": {"rms_norm": True, "distances": [1, 2, 3]},
    "pruned-two-distances-tp2": _TP2 | {"projection": "pruned", "distances": [2, 1], "skip_groups": 4},
    "gqa-pruned-tp2": _GQA_PRUNED | _TP2,
    "sdpa-gqa-pruned": _SDPA | _GQA_PRUNED | {"skip_groups": 1},
    "values-of-two-layers": _VALUES_OF_TWO,
    "values-of-two-layers-pruned-tp2": _VALUES_OF_TWO | _TP2 | {"projection": "pruned", "skip_groups": 4},
    "source-layer-tp2": _TP2 | {"distances": [], "source_layers": [1]},
    "recompute": {"recompute": "uniform2", "distances": [1]},
    "recompute-block-tp2": _TP2 | {"recompute": "block", "distances": [1]},
    "distance-beyond": {"distances": [4], "like dense": True},
    "sdpa-distance-beyond-tp2": _SDPA | _TP2 | {"distances": [5], "like dense": True},
}
CASES = {
    f"{model}-{name}": _BASE | {"model": model} | changes
    for model, cases in (("bert", _BERT), ("vision", _VISION))
    for name, changes in cases.items()
}
#: The reference is that of another model.
MISTAKEN = {
    f"vision, {name}": _BASE | {"model": "vision"} | changes
    for name, changes in {
        "a distance": {"mistake": {"distances": [2]}},
        "the order of two distances": {"distances": [2, 1], "mistake": {"distances": [1, 2]}},
        "keys for values": _VALUES_OF_TWO | {"mistake": {"share": "keys"}},
        "one group less": _TP2 | {"mistake": {"skip_groups": 2}},
        "dense": {"mistake": {"distances": []}},
    }.items()
}

Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """All cases of both models in one group of two gloo ranks."""
    return run_worker("encoder_worker", CASES | MISTAKEN, 2, tmp_path_factory.mktemp("encoders"))[0]


@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient(answers: Answers, name: str) -> None:
    """Everything but padding sees everything else, in both directions and in no other sequence or image."""
    found = dict(answers[name])
    assert found.pop("least in its sequence") > 0.0
    assert found.pop("in other sequences") == 0.0
    # Exactly: its weight in the softmax is zero.
    assert found.pop("by padding") == 0.0
    # With a distance that no layer reaches, bit for bit.
    assert found.pop("is dense", None) is (True if "distance-beyond" in name else None)
    ends = {
        "bert": {"encoder.layers.3.self_attention.linear_qkv.weight", "lm_head.dense.bias"},
        "vision": {"decoder.layers.3.self_attention.linear_qkv.weight", "conv1.weight", "class_token", "ln_pre.weight"},
    }
    assert {"output"} | ends[CASES[name]["model"]] <= set(found)
    too_large = {tensor: error for tensor, error in found.items() if not error <= TOLERANCE}
    assert not too_large


@pytest.mark.parametrize("name", MISTAKEN)
def test_a_mistake_is_seen(answers: Answers, name: str) -> None:
    """In the output, and in the projections' gradients."""
    found = answers[name]
    assert found["output"] > 100 * TOLERANCE
    assert found["decoder.layers.3.self_attention.linear_qkv.weight"] > 100 * TOLERANCE
