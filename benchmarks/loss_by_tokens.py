"""Validation loss against tokens, of a sweep's rows: what a run was evaluated at while it trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sla_megatron.commands.sweep.setting import Setting
from sla_megatron.commands.sweep.summary import Group, groups

from .comparisons import label_of
from .record import draw_band, save_figure

Row = dict[str, Any]
#: Tokens -> loss, of one run.
Losses = dict[int, float]


def plot_losses(rows: Sequence[Row], path: Path) -> None:
    """Mean over seeds, least to most, dense and skip-layer: a panel for each size, at the longest context of each.

    Below each, differences to the dense run of the same seed.  Each evaluation draws samples of its own, the same ones
    for all settings of a seed: a curve's bends, and most of a loss's spread, are the samples'.
    """
    from matplotlib import pyplot, ticker

    found = groups([row for row in rows if len(row["validation_losses"]) > 1])
    longest = {group.size: max(g.context for g in found if g.size == group.size) for group in found}
    figure, axes = pyplot.subplots(2, len(longest), figsize=(5 * len(longest), 6), squeeze=False, sharex="col")
    for (above, below), (size, context) in zip(axes.T, longest.items(), strict=True):
        own = [group for group in found if (group.size, group.context) == (size, context)]
        dense = {seed: losses for group in own if group.is_dense for seed, losses in by_seed(rows, group).items()}
        for number, group in enumerate(own):
            losses = by_seed(rows, group)
            style = {"color": "black", "linestyle": "--"} if group.is_dense else {"color": f"C{number}"}
            draw(above, losses, label_of(group), style)
            if not group.is_dense:
                draw(below, less(losses, dense), "", style)
        above.set_title(f"{size}, context {context}", loc="left")
        above.set_ylabel("validation loss, nats a token")
        above.legend(fontsize="small")
        below.axhline(0, color="black", linestyle="--", linewidth=1)
        below.set(xlabel="tokens", ylabel="less dense")
        below.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    figure.tight_layout()
    save_figure(figure, path)
    pyplot.close(figure)


def by_seed(rows: Sequence[Row], group: Group) -> dict[int, Losses]:
    """The losses of each of ``group``'s runs."""
    return {
        row["seed"]: {int(tokens): loss for tokens, loss in row["validation_losses"]}
        for row in rows
        if (row["size"], row["context"], Setting.of_row(row)) == (group.size, group.context, group.setting)
    }


def less(losses: dict[int, Losses], dense: dict[int, Losses]) -> dict[int, Losses]:
    """What is left of each seed's losses less those of its dense run."""
    return {
        seed: {tokens: loss - dense[seed][tokens] for tokens, loss in of_seed.items() if tokens in dense[seed]}
        for seed, of_seed in losses.items()
        if seed in dense
    }


def draw(axis: Any, losses: dict[int, Losses], label: str, style: dict[str, Any]) -> None:
    """A line of means over seeds, in a band from least to most, at the tokens that all seeds have."""
    if not losses:
        return
    shared = sorted(set.intersection(*(set(of_seed) for of_seed in losses.values())))
    several = [[of_seed[tokens] for of_seed in losses.values()] for tokens in shared]
    draw_band(axis, shared, several, label=label, **style)
