"""What a result of ``positions`` shows: losses by position, and their differences to dense, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sla_megatron.commands.sweep.setting import Setting

from .paired import Difference, difference
from .record import Table, draw_band, save_figure

Row = dict[str, Any]
#: First and last position.
Bin = tuple[int, int]

_NOTE = (
    "Nats a token, mean over seeds; fp32, the whole held-out part of the text in windows of the context's length, the "
    "same for all runs. Position: tokens that one is predicted from, of this document or the ones before it. less "
    "dense: runs of one seed, 95 % interval and p of the paired t test, and seeds below dense."
)


def tables(result: dict[str, Any]) -> list[Table]:
    """A line for each text, context, setting and bin."""
    header = ("text", "context", "distance", "variant", "position", "seeds", "loss", "dense")
    header = (*header, "less dense (95 % interval)", "p", "below")
    rows = [
        (*cells, *found.cells)
        for (size, context, setting), runs in settings(result["rows"]).items()
        for cells, found in _lines(size, context, setting, runs, result["rows"])
    ]
    return [Table("Loss by position within the context", header, rows, (0, 3), _NOTE)]


def _lines(
    size: str, context: int, setting: Setting, runs: Sequence[Row], rows: Sequence[Row]
) -> list[tuple[tuple[str, ...], Difference]]:
    read = "+".join(map(str, setting.distances or setting.sources))
    variant = f"layers {setting.layers}" if setting.layers else ""
    pairs = paired(runs, rows)
    lines = []
    for number, (first, last, _) in enumerate(runs[0]["bins"]):
        losses = [(run["bins"][number][2], dense["bins"][number][2]) for run, dense in pairs]
        means = [f"{fmean(side):.4f}" for side in zip(*losses, strict=True)]
        cells = (size, str(context), read, variant, f"{first}-{last}", str(len(pairs)), *means)
        lines.append((cells, difference([loss - dense for loss, dense in losses])))
    return lines


def settings(rows: Sequence[Row]) -> dict[tuple[str, int, Setting], list[Row]]:
    """Skip-layer runs that differ in their seed alone and have a dense run, by text, context and setting."""
    found: dict[tuple[str, int, Setting], list[Row]] = {}
    for row in rows:
        setting = Setting.of_row(row)
        if not setting.is_dense and paired([row], rows):
            found.setdefault((row["size"], row["context"], setting), []).append(row)
    order = sorted(found, key=lambda key: (key[0], key[1], *key[2].order))
    return {key: found[key] for key in order}


def paired(runs: Sequence[Row], rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Each of ``runs`` with the dense run of its text, context and seed, where there is one."""
    dense = {(row["size"], row["context"], row["seed"]): row for row in rows if Setting.of_row(row).is_dense}
    found = [(run, dense.get((run["size"], run["context"], run["seed"]))) for run in runs]
    return [(run, other) for run, other in found if other is not None]


def differences(runs: Sequence[Row], rows: Sequence[Row]) -> dict[Bin, list[float]]:
    """Bin -> loss less dense's, of each pair."""
    found: dict[Bin, list[float]] = {}
    for run, dense in paired(runs, rows):
        for (first, last, loss), (*_, other) in zip(run["bins"], dense["bins"], strict=True):
            found.setdefault((first, last), []).append(loss - other)
    return found


def plot(result: dict[str, Any], path: Path) -> None:
    """Differences to dense by position: a panel for each text and context, mean over seeds, least to most."""
    from matplotlib import pyplot

    found = settings(result["rows"])
    panels = sorted({(size, context) for size, context, _ in found})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False, sharey=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        for (size, context, setting), runs in found.items():
            if (size, context) == panel:
                _draw(axis, differences(runs, result["rows"]), setting)
        axis.axhline(0, color="black", linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="position")
        axis.set_title(f"{panel[0]}, context {panel[1]}", loc="left")
    axes[0][0].set_ylabel("loss less dense, nats a token")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    save_figure(figure, path)
    pyplot.close(figure)


def _draw(axis: Any, by_bin: dict[Bin, list[float]], setting: Setting) -> None:
    middles = [(first * last) ** 0.5 for first, last in by_bin]
    label = f"distance {'+'.join(map(str, setting.distances))}" + (f", layers {setting.layers}" * bool(setting.layers))
    draw_band(axis, middles, list(by_bin.values()), label=label)
