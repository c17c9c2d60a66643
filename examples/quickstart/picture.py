"""The quickstart's picture: the losses of both models against the tokens that they have seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from examples.quickstart.training_log import Records
from sla_megatron.common.figures import save_figure

#: Of a model: its name in the picture, and its colour.
MODELS = {"dense": ("dense", "tab:gray"), "sla": ("skip-layer", "tab:blue")}

Points = list[tuple[int, float]]


def points(records: Records, tokens_per_iteration: int) -> tuple[Points, Points]:
    """Tokens seen and loss in nats a token: of training, and on held-out text.

    Where a run went on from a checkpoint, what was trained again counts once, as it was last.
    """
    training = {step.iteration: step.loss for step in records.steps if math.isfinite(step.loss)}
    validation = {each.iteration: each.loss for each in records.validations if math.isfinite(each.loss)}
    curves = (sorted(losses.items()) for losses in (training, validation))
    first, second = ([(iteration * tokens_per_iteration, loss) for iteration, loss in curve] for curve in curves)
    return first, second


def draw(runs: Mapping[str, Records], tokens_per_iteration: int, path: Path) -> str:
    """Draws the runs, by model, into the SVG file `path`; a line for the report that says where it is, or why not.

    In the file each curve is a group of its own, such as `dense-training`.
    """
    if find_spec("matplotlib") is None:
        return "no picture: it needs matplotlib (pip install matplotlib)"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for model, records in runs.items():
        name, colour = MODELS[model]
        training, validation = points(records, tokens_per_iteration)
        axes.plot(*zip(*training, strict=True), color=colour, linewidth=1.2, label=name, gid=f"{model}-training")
        axes.plot(
            *zip(*validation, strict=True), color=colour, marker="o", linestyle="", label=f"{name}, held out",
            gid=f"{model}-validation",
        )  # fmt: skip
    axes.set(xlabel="tokens", ylabel="loss, nats a token", title="one seed, the same batches in the same order")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False)
    save_figure(figure, path, salt="quickstart")
    return f"picture      {path}"
