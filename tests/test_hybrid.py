"""Hybrid models: attention layers share K/V, layers of other kinds pass them by.

Against the plain reference, against the GPT whose layers they are, and in pipelines against no pipeline.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.launch import run_worker
from tests.support.parity import relative_errors

pytestmark = pytest.mark.distributed

# As in test_parity.py.
TOLERANCE = 1e-5

BASE = {
    "groups": 4,
    "rope": True,
    "rms_norm": True,
    "projection": "full",
    "tp": 1,
    "sequence_parallel": False,
    "recompute": "none",
    "distances": [1],
    "skip_groups": 3,
}
EXPERTS = {"bias": False, "swiglu": True}

#: Patterns against the reference, which takes the layers in turn.
CASES: dict[str, dict[str, Any]] = {
    "gpt": {"pattern": "*-*-*-*-", "distances": [3, 1], "groups": 2, "skip_groups": 2},
    "two-and-two": {"pattern": "**--", "rms_norm": False, "rope": False},
    "experts": {"pattern": "*E*-", **EXPERTS},
    "ends-in-attention": {"pattern": "*-*", "projection": "pruned", "qk_norm": True},
    "begins-with-others": {"pattern": "-E**-*", **EXPERTS, "distances": [2, 1], "projection": "pruned"},
    "tp2": {"pattern": "*--**", "tp": 2, "sequence_parallel": True, "distances": [2, 1], "skip_groups": 4},
    "cp2": {"pattern": "-**-*", "cp": 2, "core_attention": "sdpa", "distances": [2]},
    # Chunks of mixed layers, in which a source and its reader lie together, apart, and beside a chunk of none.
    "uniform-3": {"pattern": "*--*-***", "recompute": "uniform3", "distances": [2, 1]},
    "block": {"pattern": "*-*E*", "recompute": "block", **EXPERTS},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """All cases in one group of two gloo ranks."""
    cases = {name: BASE | case for name, case in CASES.items()}
    # Controls: the reference reads another layer.
    cases["mistaken"] = BASE | CASES["gpt"] | {"reference_distances": [2, 1]}
    return run_worker("parity_worker", cases, 2, tmp_path_factory.mktemp("parity"))[0]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_gradient(answers: dict[str, dict[str, float]], name: str) -> None:
    """As of the plain model whose layers the pattern names."""
    errors = relative_errors(answers[name], attention=CASES[name]["pattern"].rindex("*"))
    assert {tensor: error for tensor, error in errors.items() if not error <= TOLERANCE} == {}


def test_another_source_is_seen(answers: dict[str, dict[str, float]]) -> None:
    """The comparison finds a model whose attention reads another layer."""
    assert answers["mistaken"]["logits"] > 100 * TOLERANCE
