"""bf16 against the reference: a skip-layer model's error beside a dense one's of the same size, in the same run.

How large an error is depends on the size, the weights and the device; that skip-layer attention adds none of its own
shows in the ratio.
"""

from __future__ import annotations

import json
from typing import Any

#: Of single tensors and draws errors vary twofold; of their root mean square over these draws, by a tenth or so.
DRAWS = 16
RATIO = 1.5

#: What a dense model of the same size has in the place of a case's settings.
_DENSE = {"skip_groups": 0, "projection": "full", "distances": [1], "source_layers": [], "share": "kv", "mistake": {}}

_LOGITS = ("logits", "evaluation")
#: What ``parity_worker`` answers beside errors.
_EXACT = ("dead rows", "before change", "after change")


def with_dense(cases: dict[str, dict[str, Any]], draws: int = DRAWS) -> dict[str, dict[str, Any]]:
    """``cases`` of ``parity_worker`` in bf16, and the dense model of each size among them."""
    drawn = {name: case | {"bf16": True, "draws": draws} for name, case in cases.items()}
    return drawn | {_dense_name(case): case | _DENSE for case in drawn.values()}


def ratios(cases: dict[str, dict[str, Any]], answers: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Case -> what is compared -> error over that of the dense model of its size.

    The logits' is over dense's logits', every gradient's over the largest of dense's gradients.

    Args:
        cases: of :func:`with_dense`.
        answers: to what it returned.
    """
    found = {}
    for name, case in cases.items():
        dense = answers[_dense_name(case)]
        largest = max(_gradients(dense).values())
        found[name] = {what: answers[name][what] / dense[what] for what in _LOGITS}
        found[name] |= {tensor: error / largest for tensor, error in _gradients(answers[name]).items()}
    return found


def _gradients(answer: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in answer.items() if name not in (*_LOGITS, *_EXACT)}


def _dense_name(case: dict[str, Any]) -> str:
    """Of the settings that are not skip-layer attention's."""
    size = {name: value for name, value in case.items() if name not in (*_DENSE, "bf16", "draws")}
    return f"bf16 dense {json.dumps(size, sort_keys=True)}"
