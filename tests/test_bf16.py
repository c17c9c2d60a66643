"""bf16 on the CPU: the check of ``test_gpu.py``, that a skip-layer model's error is a dense one's, finds mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import bf16, gpu
from tests.support.launch import run_worker
from tests.support.parity import FROM_ONE, parity_case

pytestmark = pytest.mark.distributed

SOUND = {
    "full": parity_case(),
    "pruned": parity_case(projection="pruned", groups=2, skip_groups=2),
    "values-from-one": parity_case(**FROM_ONE, projection="pruned"),
    "two-distances": parity_case(distances=[2, 1]),
}
#: Another source than the reference's, for all groups or, of three that skip, for one.
BROKEN = {
    "wrong-source": parity_case(distances=[1], mistake={"distances": [2]}),
    "one-wrong-source": parity_case(distances=[2, 1], mistake={"distances": [2]}),
}


def test_the_error_is_a_dense_models_where_nothing_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLA_TEST_DEVICE", raising=False)
    (answers,) = run_worker("parity_worker", bf16.with_dense(SOUND | BROKEN, draws=8), 1, tmp_path)
    found = bf16.ratios(SOUND | BROKEN, answers)
    for name in SOUND:
        gpu.largest_error(answers[name])
        # It is bf16 that was measured: fp32 is right to 1e-5.
        assert answers[name]["logits"] > 1e-3
        assert max(found[name].values()) <= bf16.RATIO, name
    for name in BROKEN:
        assert found[name]["logits"] > bf16.RATIO and max(found[name].values()) > bf16.RATIO, name
