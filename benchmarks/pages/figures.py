"""The figures that a result has for a claim: of each of its rows, as its page shows them, with how many runs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from examples.side_by_side.report import pairs
from sla_megatron.attention.sla_config import default_num_skip_groups, default_skip_distance
from sla_megatron.commands.sweep.setting import Setting
from sla_megatron.commands.sweep.summary import groups

from ..paired import difference
from ..record import shown
from ..throughput import peak_over_dense
from .evidence import Result

#: Of a figure that is counted, not timed.
COUNTED = "counted"


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        value: a median, a mean, or what was counted; by it the worst row is found.
        text: as the page with the rows shows it, with its spread.
        sample: of how many runs it is: ``n 24``, ``5 seeds``, ``counted``.
        most: the upper end of a mean's interval; ``None`` where there is none.
        as_planned: whether a counted figure is exactly what the formula gives.
    """

    value: float
    text: str
    sample: str
    most: float | None = None
    as_planned: bool = True


def of_spread(spread: dict[str, float], digits: int = 3) -> Figure:
    """A median with its spread."""
    return Figure(spread["median"], shown(spread, digits), f"n {spread['n']}")


def speed(result: Result, variant: str, pipelined: bool = False) -> list[Figure]:
    """Of ``throughput``: tokens/s of ``variant`` over dense's, in turns, on one rank or in a pipeline."""
    return [
        of_spread(row["speed_over_dense"])
        for row in result["rows"]
        if row["variant"] != "dense" and variant in ("any", row["variant"]) and (row["layout"] != "1x1") == pipelined
    ]


def peak(result: Result) -> list[Figure]:
    """Of ``throughput``: peak memory over dense's."""
    rows = [row for row in result["rows"] if row["variant"] != "dense"]
    ratios = [peak_over_dense(row, result["rows"]) for row in rows]
    return [Figure(ratio, f"{ratio:.3f}", COUNTED) for ratio in ratios]


def cache(result: Result) -> list[Figure]:
    """Of ``generation``: bytes of keys and values over dense's, which must be the formula's."""
    found = []
    for row in result["rows"]:
        for variant, ratio in row["cache_ratio"].items():
            of = row["variants"][variant]
            is_formula = of["cache_bytes"] == of["formula_bytes"]
            if variant != "peer":
                found.append(Figure(ratio, f"{ratio:.4f}", COUNTED, as_planned=is_formula))
    return found


def decoding(result: Result, narrow: bool) -> list[Figure]:
    """Of ``generation``: tokens/s over dense's, of models whose time is that of starting operations, or of others."""
    return [
        of_spread(ratio)
        for row in result["rows"]
        if row["model"].startswith("narrow") == narrow
        for ratio in row["decode_ratio"].values()
    ]


def over_peer(result: Result) -> list[Figure]:
    """Of ``generation``: the dense model's tokens/s over those of transformers' own."""
    return [of_spread(row["decode_over_peer"]["dense"]) for row in result["rows"] if "decode_over_peer" in row]


def wire(result: Result) -> list[Figure]:
    """Of ``transport``: bytes that a step sends over dense's; each hop's must be those of the lower bound."""
    found = []
    for row in result["rows"]:
        ratio = row["sent_bytes"]["sla"] / row["sent_bytes"]["dense"]
        bounds = [(hop["sent_bytes"]["sla"], hop["hidden_bytes"] + hop["kv_bound_bytes"]) for hop in row["hops"]]
        is_bound = all(sent["forward"] == sent["backward"] == [bound] for sent, bound in bounds)
        found.append(Figure(ratio, f"{ratio:.3f}", COUNTED, as_planned=is_bound))
    return found


def predicted(result: Result) -> list[Figure]:
    """Of ``plan``: a predicted step over a real one."""
    rows = [row for row in result["rows"] if "predicted_over_measured" in row]
    return [of_spread(row["predicted_over_measured"]) for row in rows]


def conversion(result: Result) -> list[Figure]:
    """Of ``convert``: seconds of its largest model, each way."""
    return [of_spread(row["sizes"][-1]["seconds"]["convert"], 2) for row in result["rows"]]


def datatrove(result: Result) -> list[Figure]:
    """Of ``datatrove``: tokens a CPU second over datatrove's."""
    return [of_spread(row["speed_over_datatrove"]) for row in result["rows"]]


def recovery(result: Result) -> list[Figure]:
    """Of ``recovery``: seconds from a fault to the next new step, over the faults of a run."""
    found = []
    for row in result["rows"]:
        if "faults" in row:
            seconds = [fault["all_seconds"] for fault in row["faults"]]
            median = statistics.median(seconds)
            text = f"{median:.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
            found.append(Figure(median, text, f"{len(seconds)} faults"))
    return found


def loss_of_sweep(result: Result, text: str | None) -> list[Figure]:
    """Of ``sweep``: validation loss of the default setting less dense's of the same seed, with its 95 % interval.

    Sizes are named by their text, ``code`` or ``prose``; of sweeps before there was prose, they are code.
    Without a text: all.
    """
    found = []
    for group in groups(result["rows"]):
        default = Setting(
            distances=(default_skip_distance(group.num_layers),),
            skip_groups=default_num_skip_groups(group.num_groups),
        )
        is_chosen = text in (None, "prose" if group.size == "prose" else "code")
        if group.setting == default and group.differences and is_chosen:
            of_pairs = difference(list(group.differences.values()))
            figure = Figure(of_pairs.mean, of_pairs.shown(), f"{of_pairs.n} seeds", most=of_pairs.high)
            found.append(figure)
    return found


def loss_of_run(result: Result) -> list[Figure]:
    """Of ``loss``: validation loss with ``--sla`` less dense's, one seed."""
    dense = next(row["validation_loss"] for row in result["rows"] if row["variant"] == "dense")
    found = [row["validation_loss"] - dense for row in result["rows"] if row["variant"] == "full"]
    return [Figure(value, f"{value:+.4f}", "1 seed") for value in found]


def over_seeds(result: Result, quantity: str) -> list[Figure]:
    """Of ``encoder`` and ``vision``: ``quantity`` at the end, SLA's less dense's, with its 95 % interval."""
    found = pairs(result["rows"], quantity)
    return [Figure(found.mean, found.shown(), f"{found.n} seeds", most=found.high)]
