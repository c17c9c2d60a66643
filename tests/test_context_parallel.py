"""``--core-attention sdpa`` with context parallelism, where each rank holds its share of the sequence and of shared
K/V, and with several documents in one sample: against the reference, which knows of no ranks and sees each document
alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.launch import run_worker
from tests.support.parity import relative_errors

pytestmark = pytest.mark.distributed

# As in test_parity.py.
TOLERANCE = 1e-5

BASE = {
    "core_attention": "sdpa",
    "groups": 4,
    "rope": True,
    "rms_norm": True,
    "projection": "full",
    "tp": 1,
    "cp": 2,
    "sequence_parallel": False,
    "recompute": "none",
    "distances": [2, 1],
    "skip_groups": 3,
}

#: Where documents start in the two samples; the changed token, 7, is in a document that others follow.
DOCUMENTS = {"documents": [[0, 3, 8, 9], [0, 11]]}

#: The upper half reads layer 2.
HALF = {"distances": [], "source_layers": [2], "skip_groups": 4}

CASES: dict[str, dict[str, Any]] = {
    "cp1": {"cp": 1},
    "cp2": {},
    "cp4-pruned-learned": {"cp": 4, "projection": "pruned", "rope": False, "rms_norm": False},
    "cp4-gqa": {"cp": 4, "groups": 2, "skip_groups": 2},
    "cp2-tp2": {"tp": 2, "sequence_parallel": True, "qk_norm": True},
    "cp2-tp2-gqa-pruned": {"tp": 2, "groups": 2, "skip_groups": 2, "distances": [3], "projection": "pruned"},
    "cp2-selective": {"recompute": "selective"},
    "cp4-uniform2": {"cp": 4, "recompute": "uniform2"},
    "documents": DOCUMENTS | {"cp": 1, "projection": "pruned"},
    "documents-learned": DOCUMENTS | {"cp": 1, "rope": False, "rms_norm": False, "recompute": "selective"},
    # As the data loader of a script of one's own gives them, and as Transformer Engine's attention wants them.
    "documents-thd": DOCUMENTS | {"cp": 1, "packed": "thd"},
    "cp2-tp2-documents": DOCUMENTS | {"tp": 2, "sequence_parallel": True},
    "cp4-documents-uniform2": DOCUMENTS | {"cp": 4, "groups": 2, "skip_groups": 2, "recompute": "uniform2"},
    # Half-shared, of keys: values are each layer's own.
    "cp4-keys-half-pruned": {**HALF, "cp": 4, "share": "keys", "projection": "pruned"},
    "cp2-tp2-half-documents-uniform2": DOCUMENTS | HALF | {"tp": 2, "recompute": "uniform2"},
    "cp2-dense": {"skip_groups": 0, "distances": [1]},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """All cases in one group of four gloo ranks; those that a case does not need are data-parallel."""
    cases = {name: BASE | case for name, case in CASES.items()}
    return run_worker("parity_worker", cases, 4, tmp_path_factory.mktemp("parity"))[0]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_gradient(answers: dict[str, dict[str, float]], name: str) -> None:
    errors = relative_errors(answers[name])
    assert {tensor: error for tensor, error in errors.items() if not error <= TOLERANCE} == {}
