"""The rows of a table and the plot that examples share, from a result's JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.paired import Difference, difference
from benchmarks.record import save_figure

MODELS = {"dense": "dense", "sla": "SLA"}
HEADER = ("held out", "dense", "SLA", "SLA against dense, paired")

Row = dict[str, Any]


def settings_line(settings: dict[str, Any]) -> str:
    """The shape of the models and what skips, for a table's title."""
    return (
        f"{settings['layers']} layers, {settings['heads']} heads, hidden {settings['hidden']}, "
        f"distance {' '.join(map(str, settings['distance']))}, {settings['skip_groups']} skip groups, "
        f"{settings['core_attention']} core attention"
    )


def learned(rows: Sequence[Row], label: str, quantity: str) -> list[str]:
    """``loss`` or ``accuracy`` at the end: of each model over the seeds, and the difference of a seed's pair."""
    ends = {name: [row["curve"][-1][name][quantity] for row in rows] for name in MODELS}
    return [label, *(_over_seeds(ends[name], 4) for name in MODELS), pairs(rows, quantity).shown()]


def speed(rows: Sequence[Row], label: str, a_step: Callable[[Row], float]) -> list[str]:
    """Of each model over the seeds, ``a_step`` being what a step of it takes in, and the ratio of a step's pair."""
    rates = {name: [a_step(row) / row["seconds"][name]["median"] for row in rows] for name in MODELS}
    ratios = [row["step_ratio"]["median"] for row in rows]
    return [label, *(_over_seeds(rates[name], 0) for name in MODELS), f"x {_over_seeds(ratios, 3)}"]


def pairs(rows: Sequence[Row], quantity: str) -> Difference:
    """SLA's less dense's, at the end, over the seeds."""
    ends = [row["curve"][-1] for row in rows]
    return difference([end["sla"][quantity] - end["dense"][quantity] for end in ends])


def seeds_line(rows: Sequence[Row]) -> str:
    """What the table's figures are, and how sure the sign of the loss's difference is; for its note."""
    loss = pairs(rows, "loss")
    return (
        f"Mean (least to most) over {len(rows)} seeds of the weights and of the data's order, which both models of a "
        f"seed share; of differences the mean (95% interval of it). SLA has the lower loss with {loss.below} of "
        f"{loss.n} seeds{f', p = {loss.p:.2g} in the paired t test' if loss.p is not None else ''}. Steps of both "
        "models took turns."
    )


def _over_seeds(values: Sequence[float], digits: int) -> str:
    figures = [f"{value:.{digits}f}" for value in (mean(values), min(values), max(values))]
    return f"{figures[0]} ({figures[1]} to {figures[2]})"


def plot_curves(result: dict[str, Any], path: Path, loss: str, level: tuple[float, str]) -> None:
    """Held-out loss against steps, a line a seed, into the SVG file ``path``.

    Args:
        result: has the curves.
        path: the file.
        loss: what it is of, for the axis.
        level: a loss to compare with, dotted, and what it is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6))
    axes = figure.subplots()
    for name, colour in zip(MODELS, ("tab:gray", "tab:blue"), strict=True):
        for index, row in enumerate(result["rows"]):
            steps, losses = zip(*((point["step"], point[name]["loss"]) for point in row["curve"]), strict=True)
            label = MODELS[name] if index == 0 else None
            axes.plot(steps, losses, color=colour, marker=".", linewidth=1.2, label=label)
    axes.axhline(level[0], color="black", linestyle=":", linewidth=1, label=level[1])
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss of {loss}, held out (nats)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save_figure(figure, path)
