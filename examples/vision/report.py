"""The table and the plot of a result, from its JSON alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.record import Table
from examples.side_by_side.report import HEADER, learned, plot_curves, seeds_line, settings_line, speed


def tables(result: dict[str, Any]) -> list[Table]:
    """One table: what both models learned and how fast, over the seeds."""
    rows, settings = result["rows"], result["settings"]
    first = rows[0]
    return [
        Table(
            f"Digits by Megatron's vision transformer, dense and with SLA: {settings['images']}, {first['patches']} "
            f"patches of {settings['patch']} x {settings['patch']} pixels, {settings_line(settings)}, tensor-parallel "
            f"over {settings['tp']}",
            HEADER,
            [
                learned(rows, "loss, nats", "loss"),
                learned(rows, "accuracy", "accuracy"),
                speed(rows, "images/s", lambda row: row["images_a_step"]),
            ],
            note=f"{seeds_line(rows)} {first['steps']} steps of {first['images_a_step']} images, of "
            f"{first['train_images']:,}; {first['held_out_images']} others are held out.",
        )
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Held-out loss against steps, a line a seed, into the SVG file ``path``."""
    plot_curves(result, path, "images", (math.log(10), "any digit alike"))
