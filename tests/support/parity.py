"""What the tests that ask ``parity_worker`` have in common."""

from __future__ import annotations

from typing import Any

#: SkipV1Former's: all later layers read the first one's values.
FROM_ONE = {"share": "values", "distances": [], "source_layers": [1], "skip_groups": 2}


def parity_case(**changes: Any) -> dict[str, Any]:
    """A model of ``parity_worker``."""
    case = {
        "groups": 4,
        "rope": True,
        "rms_norm": True,
        "projection": "full",
        "tp": 1,
        "sequence_parallel": False,
        "recompute": "none",
        "distances": [2],
        "skip_groups": 3,
    }
    return case | changes


def relative_errors(answer: dict[str, float], attention: int = 3) -> dict[str, float]:
    """An answer's errors, of logits and gradients by name; what must hold exactly has been found to hold.

    ``attention`` is the number, from 0, of a layer that has attention.
    """
    errors = dict(answer)
    assert {"logits", "evaluation", f"decoder.layers.{attention}.self_attention.linear_qkv.weight"} <= set(errors)
    assert errors.pop("dead rows") == 0.0
    # Bit for bit, where the step was repeated.
    assert errors.pop("repeated", 0.0) == 0.0
    # Causality, exactly: the same products are summed in the same order.
    assert errors.pop("before change") == 0.0
    assert errors.pop("after change") > 0.0
    return errors
