"""The simulated timeline as a picture: dense above, SLA below, one row a pipeline rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...common.figures import save_figure
from .predict import Prediction
from .timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Above this many passes they have no microbatch numbers, and in an SVG they are an image.
_FEW, _MANY = 400, 20_000

_FORWARD, _BACKWARD = (0.20, 0.45, 0.80), (0.20, 0.62, 0.38)


def plot(prediction: Prediction, path: Path) -> None:
    """Draw ``prediction`` to ``path``, a ``.png`` or ``.svg`` file, which is there whole or not at all."""
    from matplotlib.figure import Figure

    ranks = prediction.sla.schedule.pipeline_size
    figure = Figure(figsize=(14, min(24, 3 + 0.5 * ranks)), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for one, name, timeline in zip(axes, ("dense", "SLA"), (prediction.dense, prediction.sla), strict=True):
        _draw(one, timeline)
        one.set_title(
            f"{name}: step {timeline.step_time * 1e3:.4g} ms, computing {100 * timeline.busy:.1f} %", loc="left"
        )
    axes[1].set_xlabel("ms")
    figure.suptitle(
        f"Predicted step-time overhead {100 * prediction.overhead:+.2f} % "
        "(blue: forward, green: backward, darker: later virtual stages)"
    )
    save_figure(figure, path, "sla-plan", dpi=150)


def _draw(axes: Axes, timeline: Timeline) -> None:
    from matplotlib.collections import PolyCollection

    schedule = timeline.schedule
    boxes, colours = [], []
    count = sum(map(len, timeline.starts))
    for rank in range(schedule.pipeline_size):
        for one, start, end in timeline.intervals(rank):
            left, right = 1e3 * start, 1e3 * end
            boxes.append(((left, rank - 0.4), (right, rank - 0.4), (right, rank + 0.4), (left, rank + 0.4)))
            shade = 1 - 0.6 * one.chunk / schedule.num_chunks
            colours.append(tuple(shade * part for part in (_FORWARD if one.kind == "F" else _BACKWARD)))
            if count <= _FEW:
                axes.text(
                    (left + right) / 2, rank, str(one.microbatch), ha="center", va="center", size=6, color="white"
                )
    edge = {"edgecolors": "white", "linewidths": 0.4} if count <= _MANY // 10 else {"linewidths": 0}
    axes.add_collection(PolyCollection(boxes, facecolors=colours, rasterized=count > _MANY, **edge))
    axes.set_xlim(0, 1e3 * timeline.step_time)
    # Rank 0 on top.
    axes.set_ylim(schedule.pipeline_size - 0.5, -0.5)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("pipeline rank")
