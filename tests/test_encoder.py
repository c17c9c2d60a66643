"""Skip-layer attention in a bidirectional encoder: Megatron's BERT against the reference, and the example."""

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
    "core": "megatron",
    "tp": 1,
    "sequence_parallel": False,
    "recompute": "none",
    "rope": False,
    "rms_norm": False,
    "tied": False,
}
_CHANGES: dict[str, dict[str, Any]] = {
    "megatron": {},
    "sdpa": {"core": "sdpa"},
    "megatron-tp2": {"tp": 2},
    "sdpa-tp2": {"core": "sdpa", "tp": 2},
    "sdpa-tp2sp-tied": {"core": "sdpa", "tp": 2, "sequence_parallel": True, "tied": True},
    "rope-two-distances": {"rope": True, "distances": [2, 1]},
    "gqa-pruned-tp2": {"groups": 2, "skip_groups": 2, "projection": "pruned", "tp": 2},
    "sdpa-gqa-pruned": {"core": "sdpa", "groups": 2, "skip_groups": 1, "projection": "pruned"},
    "recompute": {"recompute": "uniform2", "distances": [1]},
    "distance-beyond": {"distances": [4], "like dense": True},
    "sdpa-distance-beyond-tp2": {"core": "sdpa", "distances": [5], "tp": 2, "like dense": True},
}
CASES = {name: _BASE | changes for name, changes in _CHANGES.items()}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases in one group of two gloo ranks: a Megatron process takes ten seconds to start."""
    return run_worker("encoder_worker", CASES, 2, tmp_path_factory.mktemp("encoder"))[0]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_gradient(answers: dict[str, dict[str, Any]], name: str) -> None:
    """Every token but padding sees every other, in both directions and in no other sequence."""
    found = dict(answers[name])
    assert found.pop("least before the change") > 0.0
    assert found.pop("least after the change") > 0.0
    assert found.pop("in other sequences") == 0.0
    # Exactly: its weight in the softmax is zero.
    assert found.pop("by padding") == 0.0
    # With a distance that no layer reaches, bit for bit.
    assert found.pop("is dense", None) is (True if "distance-beyond" in name else None)
    assert {"logits", "encoder.layers.3.self_attention.linear_qkv.weight", "lm_head.dense.bias"} <= set(found)
    too_large = {tensor: error for tensor, error in found.items() if not error <= TOLERANCE}
    assert not too_large
