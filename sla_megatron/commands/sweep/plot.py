"""Validation loss against distance and against heads that skip: mean over seeds, least to most, and the dense line.

Settings with a name are on no axis: their differences to dense are drawn one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...common.figures import save_figure
from .summary import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = ("loss-against-distance.svg", "loss-against-heads.svg", "difference-by-setting.svg")

Draw = Callable[["Axes", Sequence[Group]], None]

_COLOURS = ("#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")


def plot(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Draw the pictures that there are points for into ``folder``; the same groups draw the same files, byte for byte.

    A panel for each size and context.  Several distances in one model are at their mean, with a mark of their own.
    Returns the files; none without runs of skip-layer attention.
    """
    dense = [group for group in groups if group.is_dense]
    plain = [group for group in groups if not group.is_dense and not group.setting.label]
    # A layer that all read is at no one distance.
    near = [group for group in plain if group.setting.distances]
    named = [group for group in groups if group.setting.label and group.difference is not None]
    paths = [folder / name for name in NAMES]
    if near:
        across = "skip distance in layers"
        _picture([*dense, *near], paths[0], _against(across, lambda g: fmean(g.setting.distances), _heads))
    if plain:
        across = "query heads that skip"
        _picture([*dense, *plain], paths[1], _against(across, lambda g: float(g.skip_heads), _distance))
    if named:
        size = (9.0, 1 + 0.3 * max(map(len, _panels(named).values())))
        _picture(named, paths[2], _differences, size)
    return [path for path, points in zip(paths, (near, plain, named), strict=True) if points]


def _heads(group: Group) -> str:
    return ", ".join(part for part in (f"{group.skip_heads} of {group.num_heads} heads", group.variant) if part)


def _distance(group: Group) -> str:
    read = f"distance {group.distance}" if group.setting.distances else group.distance
    return ", ".join(part for part in (read, group.variant) if part)


def _panels(groups: Sequence[Group]) -> dict[tuple[str, int], list[Group]]:
    """The groups of each size and context."""
    found: dict[tuple[str, int], list[Group]] = {}
    for group in groups:
        found.setdefault((group.size, group.context), []).append(group)
    return found


def _picture(groups: Sequence[Group], path: Path, draw: Draw, inches: tuple[float, float] = (5.5, 4)) -> None:
    from matplotlib.figure import Figure

    panels = _panels(groups)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(inches[0] * columns, inches[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one, ((size, context), own) in zip(axes.flat, panels.items(), strict=False):
        draw(one, own)
        one.set_title(f"{size}, {context} tokens", loc="left")
    for one in axes.flat[len(panels) :]:
        one.set_axis_off()
    save_figure(figure, path, "sla-sweep")


def _against(across: str, x: Callable[[Group], float], label: Callable[[Group], str]) -> Draw:
    """Draws losses over what ``x`` says, a line for each label."""

    def draw(axes: Axes, groups: Sequence[Group]) -> None:
        _lines(axes, groups, x, label)
        axes.set_xlabel(across)
        axes.set_ylabel("validation loss, nats a token")

    return draw


def _differences(axes: Axes, groups: Sequence[Group]) -> None:
    """A line a setting, mean and least to most over the seeds that have a dense run."""
    for below, group in enumerate(groups):
        found = group.difference
        spread = [[found.mean - found.least], [found.most - found.mean]]
        style: dict[str, Any] = {"fmt": "o", "markersize": 4, "capsize": 3, "linewidth": 1.2}
        colour = _COLOURS[group.setting.kv_projection != "full"]
        axes.errorbar([found.mean], [below], xerr=spread, color=colour, **style)
    axes.axvline(0, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(groups)), [group.variant for group in groups], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("validation loss less dense, nats a token")


def _lines(axes: Axes, groups: Sequence[Group], x: Callable[[Group], float], label: Callable[[Group], str]) -> None:
    for dense in (group for group in groups if group.is_dense):
        loss = dense.validation_loss
        axes.axhline(loss.mean, color="black", linestyle="--", linewidth=1, label="dense")
        axes.axhspan(loss.least, loss.most, color="black", alpha=0.08, linewidth=0)
    lines: dict[tuple[str, bool], list[Group]] = {}
    for group in groups:
        if not group.is_dense:
            lines.setdefault((label(group), len(group.setting.distances) > 1), []).append(group)
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
