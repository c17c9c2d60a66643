"""What cards say of runs that were compared."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .pipelines import Layout, Model, expected_wire

if TYPE_CHECKING:
    from tests.test_pipeline import Runs


def launched(ranks: int, flags: Sequence[str]) -> str:
    """The command line of a training on so many processes of the CPU."""
    return f"NPROC={ranks} launch/local.sh --device cpu {shlex.join(flags)}"


def largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Of two series, relative."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def differences(runs: Runs, name: str, reference: str, model: Model, layout: Layout) -> dict[str, Any]:
    """How far two runs are apart; what each rank of ``name`` sends in its first step, and the bound, in bytes."""
    found, plain = runs.figures(name), runs.figures(reference)
    gradients, expected = runs.gradients(name), runs.gradients(reference)
    apart = [float((gradients[key].double() - whole).norm()) for key, whole in expected.items()]
    norm = math.hypot(*(float(whole.norm()) for whole in expected.values()))
    ranks = runs.answers[name]
    share = len(ranks) // layout.pipeline
    bounds = []
    for rank, answer in enumerate(ranks):
        step = answer["steps"][0]
        passes = step["num_microbatches"], step["forward_only"]
        bounds.append(expected_wire(model, layout, rank // share, rank % layout.tensor, *passes)["sent"])
    return {
        "losses, largest relative difference": largest_difference(found["loss"], plain["loss"]),
        "losses": found["loss"],
        "gradient norms, largest relative difference": largest_difference(found["grad_norm"], plain["grad_norm"]),
        "largest difference of a parameter's gradient, of the norm of all": max(apart) / norm,
        "bytes that each rank sends in a step": [
            4 * sum(math.prod(shape) for shapes in answer["steps"][0]["sent"].values() for shape in shapes)
            for answer in ranks
        ],
        "the lower bound": [
            4 * sum(size * times for sizes in bound.values() for size, times in sizes.items()) for bound in bounds
        ],
    }
