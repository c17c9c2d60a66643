"""A made-up sweep: its runs, what Megatron prints of one, and the rows of finished ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sla_megatron.commands.sweep.flag_words import Shape
from sla_megatron.commands.sweep.grid import Run, Setting

SHAPE = Shape(
    num_layers=8, num_heads=8, num_groups=4, context=16, global_batch_size=2, log_interval=1, save_interval=None
)


DENSE = Setting()


def run_of(setting: Setting = DENSE, seed: int = 1, lr: str = "1") -> Run:
    return Run("small", setting, seed, ("--lr", lr, "--seed", str(seed), *setting.flags), 10, SHAPE)


def progress_line(iteration: int, loss: float, ms: float) -> str:
    """As Megatron prints it, behind what srun and torchrun put before it."""
    return (
        f"0: [default1]: [2026-01-01 00:00:00] iteration {iteration:8d}/      10 | consumed samples: 8 | "
        f"elapsed time per iteration (ms): {ms:.1f} | learning rate: 1.0E-03 | lm loss: {loss:.6E} | loss scale: 1.0"
    )


HEAD = ["$ bash launch/local.sh", "using world size: 2, data-parallel size: 2", "sla-megatron: off; parameters 1234"]
END = [
    "validation loss at iteration 10 | lm loss value: 9.0E+00 | lm loss PPL: 1.0E+00 | ",
    "validation loss at iteration 10 on validation set | lm loss value: 2.500000E+00 | lm loss PPL: 1.218249E+01 | ",
    "validation loss at iteration 10 on test set | lm loss value: 8.0E+00 | lm loss PPL: 1.0E+00 | ",
]
#: Iteration -> loss; its time is 100 ms, that of a launch's first one 1100.
TRUE = {i: 5 - 0.25 * i for i in range(1, 11)}


def launch(first: int, last: int) -> list[str]:
    """What Megatron prints: the second line of a launch is the mean with the first."""
    lines = []
    for i in range(first, last + 1):
        mean = (TRUE[first] + TRUE[i]) / 2 if i == first + 1 else TRUE[i]
        lines.append(progress_line(i, mean, {first: 1100, first + 1: 600}.get(i, 100)))
    return lines


def row(distances: Sequence[int], groups: int, seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    """As versions wrote it that knew distances alone: no share, no sources."""
    setting = Setting(tuple(distances), groups)
    return {
        "name": f"small-c16-{setting.name}-s{seed}",
        "size": "small",
        "context": 16,
        "distances": list(distances),
        "skip_groups": groups,
        "kv_projection": "full",
        "layers": None,
        "seed": seed,
        "num_layers": 8,
        "num_heads": 8,
        "num_groups": 4,
        "tokens": 320,
        "parameters": 1234,
        "training_loss": loss + 1,
        "validation_loss": loss,
        "perplexity": 10 * loss,
        "tokens_per_second": 100.0 * seed,
        "processes": 2,
        "device": "cpu",
    } | changes


ROWS = [
    row([], 0, 1, 3.0),
    row([], 0, 2, 3.2),
    row([], 0, 3, 3.7),
    row([6], 2, 1, 2.9),
    row([6], 2, 2, 3.4),
    # No dense run of this seed.
    row([6], 2, 4, 9.0),
    row([2], 2, 1, 2.8),
    row([2, 6], 4, 1, 2.7),
    row([6], 2, 1, 2.95, kv_projection="pruned", layers="7-8"),
]

_OF_FIRST = {"sources": [1], "share": "values", "ffn_hidden_size": None}

#: Beside the dense rows of :data:`ROWS`; a name was given to the grid when a run had its row already.
VARIANTS = [
    row([6], 2, 1, 2.9),
    row([6], 2, 1, 2.8, share="values"),
    row([6], 2, 1, 3.2, share="keys", sources=[], label=None),
    row([], 2, 2, 2.9, **_OF_FIRST),
    row([], 2, 1, 2.8, **_OF_FIRST, label="First's"),
    row(
        [], 2, 1, 2.6, **_OF_FIRST | {"ffn_hidden_size": 270}, label="First's", kv_projection="pruned", parameters=1230
    ),
    row([], 2, 1, 3.0, sources=[1, 4]),
]
