"""The table and the plot of a result, from its JSON alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.record import Table, save_figure

MODELS = {"dense": "dense", "sla": "SLA"}


def tables(result: dict[str, Any]) -> list[Table]:
    """One table: what both encoders learned and how fast, over the seeds."""
    rows, settings = result["rows"], result["settings"]
    quantities = [_learned(rows, "masked loss, nats", "loss", 4), _learned(rows, "masked accuracy", "accuracy", 4)]
    rates = {name: [row["tokens"] / row["steps"] / row["seconds"][name]["median"] for row in rows] for name in MODELS}
    ratios = [row["step_ratio"]["median"] for row in rows]
    quantities.append(["tokens/s", *(_over_seeds(rates[name], 0) for name in MODELS), f"x {_over_seeds(ratios, 3)}"])
    title = (
        f"Masked-token prediction by Megatron's BERT, dense and with SLA: {settings['layers']} layers, "
        f"{settings['heads']} heads, hidden {settings['hidden']}, sequence {settings['seq_length']}, "
        f"distance {' '.join(map(str, settings['distance']))}, {settings['skip_groups']} skip groups, "
        f"{settings['core_attention']} core attention"
    )
    return [Table(title, ["held out", "dense", "SLA", "SLA against dense, paired"], quantities, note=_note(rows))]


def _learned(rows: Sequence[dict[str, Any]], label: str, quantity: str, digits: int) -> list[str]:
    found = {name: [row["curve"][-1][name][quantity] for row in rows] for name in MODELS}
    differences = [sla - dense for dense, sla in zip(found["dense"], found["sla"], strict=True)]
    return [label, *(_over_seeds(found[name], digits) for name in MODELS), _over_seeds(differences, digits, "+")]


def _over_seeds(values: Sequence[float], digits: int, sign: str = "") -> str:
    figures = [f"{value:{sign}.{digits}f}" for value in (mean(values), min(values), max(values))]
    return f"{figures[0]} ({figures[1]} to {figures[2]})"


def _note(rows: Sequence[dict[str, Any]]) -> str:
    ahead = sum(row["curve"][-1]["sla"]["loss"] < row["curve"][-1]["dense"]["loss"] for row in rows)
    nothing, tokens = rows[0]["without_attention"], mean(row["tokens"] for row in rows)
    return (
        f"Mean (least to most) over {len(rows)} seeds of the weights and of the data's order, which both models of a "
        f"seed share; {rows[0]['steps']} steps, {tokens:,.0f} tokens; {rows[0]['held_out_masked_tokens']} masked "
        f"tokens held out. SLA has the lower loss with {ahead} of {len(rows)} seeds. Without attention the best is "
        f"loss {nothing['loss']:.4f}, accuracy {nothing['accuracy']:.4f}. Steps of both models took turns."
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Held-out loss against steps, a line a seed, into the SVG file ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6))
    axes = figure.subplots()
    for name, colour in zip(MODELS, ("tab:gray", "tab:blue"), strict=True):
        for index, row in enumerate(result["rows"]):
            steps, losses = zip(*((point["step"], point[name]["loss"]) for point in row["curve"]), strict=True)
            label = MODELS[name] if index == 0 else None
            axes.plot(steps, losses, color=colour, marker=".", linewidth=1.2, label=label)
    nothing = result["rows"][0]["without_attention"]["loss"]
    axes.axhline(nothing, color="black", linestyle=":", linewidth=1, label="best without attention")
    axes.set_xlabel("step")
    axes.set_ylabel("loss of masked tokens, held out (nats)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save_figure(figure, path)
