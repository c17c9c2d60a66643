"""The table and the plot of a result, from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.record import Table
from examples.side_by_side.report import HEADER, learned, plot_curves, seeds_line, settings_line, speed


def tables(result: dict[str, Any]) -> list[Table]:
    """One table: what both encoders learned and how fast, over the seeds."""
    rows, settings = result["rows"], result["settings"]
    nothing, tokens = rows[0]["without_attention"], mean(row["tokens"] for row in rows)
    return [
        Table(
            f"Masked-token prediction by Megatron's BERT, dense and with SLA: sequence {settings['seq_length']}, "
            f"{settings_line(settings)}",
            HEADER,
            [
                learned(rows, "masked loss, nats", "loss"),
                learned(rows, "masked accuracy", "accuracy"),
                speed(rows, "tokens/s", lambda row: row["tokens"] / row["steps"]),
            ],
            note=f"{seeds_line(rows)} {rows[0]['steps']} steps, {tokens:,.0f} tokens; "
            f"{rows[0]['held_out_masked_tokens']} masked tokens held out. Without attention the best is loss "
            f"{nothing['loss']:.4f}, accuracy {nothing['accuracy']:.4f}.",
        )
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Held-out loss against steps, a line a seed, into the SVG file ``path``."""
    nothing = result["rows"][0]["without_attention"]["loss"]
    plot_curves(result, path, "masked tokens", (nothing, "best without attention"))
