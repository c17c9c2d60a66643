"""Validation loss against distance and against heads that skip: mean over seeds, least to most, and the dense line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...common.figures import save_figure
from .summary import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = ("loss-against-distance.svg", "loss-against-heads.svg")

_COLOURS = ("#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")


def plot(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Draw both pictures into ``folder``; the same groups draw the same files, byte for byte.

    A panel for each size and context.  Several distances in one model are at their mean, with a mark of their own.
    Returns the files; none without runs of skip-layer attention.
    """
    if all(group.is_dense for group in groups):
        return []
    paths = [folder / name for name in NAMES]
    _picture(groups, paths[0], "skip distance in layers", lambda g: fmean(g.distances), _heads)
    _picture(groups, paths[1], "query heads that skip", lambda g: float(g.skip_heads), _distance)
    return paths


def _heads(group: Group) -> str:
    return ", ".join(part for part in (f"{group.skip_heads} of {group.num_heads} heads", group.variant) if part)


def _distance(group: Group) -> str:
    return ", ".join(part for part in (f"distance {group.distance}", group.variant) if part)


def _picture(
    groups: Sequence[Group], path: Path, across: str, x: Callable[[Group], float], label: Callable[[Group], str]
) -> None:
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((group.size, group.context) for group in groups))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one, (size, context) in zip(axes.flat, panels, strict=False):
        _panel(one, [group for group in groups if (group.size, group.context) == (size, context)], x, label)
        one.set_title(f"{size}, {context} tokens", loc="left")
        one.set_xlabel(across)
        one.set_ylabel("validation loss, nats a token")
    for one in axes.flat[len(panels) :]:
        one.set_axis_off()
    save_figure(figure, path, "sla-sweep")


def _panel(axes: Axes, groups: Sequence[Group], x: Callable[[Group], float], label: Callable[[Group], str]) -> None:
    for dense in (group for group in groups if group.is_dense):
        loss = dense.validation_loss
        axes.axhline(loss.mean, color="black", linestyle="--", linewidth=1, label="dense")
        axes.axhspan(loss.least, loss.most, color="black", alpha=0.08, linewidth=0)
    lines: dict[tuple[str, bool], list[Group]] = {}
    for group in groups:
        if not group.is_dense:
            lines.setdefault((label(group), len(group.distances) > 1), []).append(group)
    for number, ((name, several), points) in enumerate(lines.items()):
        shown = name
        if several and not name.startswith("distance"):
            shown = f"{name}, distances {' '.join(dict.fromkeys(group.distance for group in points))}"
        _line(axes, sorted(points, key=x), x, shown, _COLOURS[number % len(_COLOURS)], several)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")


def _line(
    axes: Axes, points: Sequence[Group], x: Callable[[Group], float], label: str, colour: str, several: bool
) -> None:
    losses = [group.validation_loss for group in points]
    spread = [[loss.mean - loss.least for loss in losses], [loss.most - loss.mean for loss in losses]]
    # Points of several distances are no line: their mean distance is a place to put them, not a quantity.
    style: dict[str, Any] = {"fmt": "D" if several else "o-", "markersize": 4, "capsize": 3, "linewidth": 1.2}
    axes.errorbar(
        [x(group) for group in points], [loss.mean for loss in losses], yerr=spread, label=label, color=colour, **style
    )
