"""The project's targets beside what the results say, and what a speed change changed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from .record import Table, shown

Result = dict[str, Any]

NOT_MEASURED = "not measured"


def targets(results: dict[str, list[Result]]) -> Table:
    """One line a target; of several rows that it holds for, the worst by its median, and how many reach the aim."""
    rows = []
    for title, aim, name, figures in _TARGETS:
        cells = [_worst(results.get(name, []), on_gpu, aim, figures) for on_gpu in (False, True)]
        rows.append((title, aim, *cells))
    note = "The worst of all rows of this page, by its median; and of how many rows the median reaches the aim."
    return Table("Ratios to dense", ("target", "aim", "CPU", "GPU"), rows, (0, 1), note)


def _worst(results: Iterable[Result], on_gpu: bool, aim: str, figures: Callable[[Result], list[Any]]) -> str:
    chosen = [result for result in results if (result["machine"]["device"] != "cpu") == on_gpu]
    found = [figure for result in chosen for figure in figures(result)]
    if not found:
        return NOT_MEASURED
    is_least, limit = aim.startswith(">="), float(aim.split()[1])
    worst = (min if is_least else max)(found, key=lambda figure: figure["median"])
    reached = sum(figure["median"] >= limit if is_least else figure["median"] <= limit for figure in found)
    figure = shown(worst) if "n" in worst else f"{worst['median']:.3f}"
    return f"{figure}; {reached} of {len(found)}"


def _speed(variant: str) -> Callable[[Result], list[Any]]:
    return lambda result: [
        row["speed_over_dense"] for row in result["rows"] if row["variant"] == variant and row["layout"] == "1x1"
    ]


def peak_over_dense(row: Result, rows: Iterable[Result]) -> float:
    """Peak memory of a row of ``throughput`` over that of the dense model among ``rows``."""
    same = ("model", "context", "layout")
    dense = next(r for r in rows if r["variant"] == "dense" and all(r[what] == row[what] for what in same))
    return row["peak_bytes"] / dense["peak_bytes"]


def _peak(result: Result) -> list[Any]:
    rows = [row for row in result["rows"] if row["variant"] != "dense" and row["layout"] == "1x1"]
    return [{"median": peak_over_dense(row, result["rows"])} for row in rows]


def _decode(narrow: bool, compiled: bool) -> Callable[[Result], list[Any]]:
    """Of the models that are so narrow that their time is that of starting operations, or of all others."""
    return lambda result: [
        ratio
        for row in result["rows"]
        # Results of before there was --compile do not say.
        if (row["model"].startswith("narrow"), row.get("compiled", False)) == (narrow, compiled)
        for ratio in row["decode_ratio"].values()
    ]


def _over_peer(result: Result) -> list[Any]:
    return [row["decode_over_peer"]["dense"] for row in result["rows"] if "decode_over_peer" in row]


_TARGETS = (
    ("training, `pruned`, tokens/s", ">= 1.00", "throughput", _speed("pruned")),
    ("training, `full`, tokens/s", ">= 0.99", "throughput", _speed("full")),
    ("training, peak memory", "<= 1.02", "throughput", _peak),
    ("generation, dense against transformers' own model", ">= 1.00", "generation", _over_peer),
    ("generation, decoded tokens/s", ">= 1.00", "generation", _decode(narrow=False, compiled=False)),
    ("the same, compiled", ">= 1.00", "generation", _decode(narrow=False, compiled=True)),
    ("where all time is that of starting operations", ">= 1.00", "generation", _decode(narrow=True, compiled=False)),
    ("the same, compiled", ">= 1.00", "generation", _decode(narrow=True, compiled=True)),
)


def before_and_after(name: str, before: Result, after: Result) -> Table:
    """The same rows at two commits, each against dense in its own run."""
    found = {}
    for what, result in (("before", before), ("after", after)):
        for key, cells in _comparable(name, result):
            found.setdefault(key, {})[what] = cells
    rows = [(*key, *both["before"], *both["after"]) for key, both in found.items() if len(both) == 2]
    keys, figures = _HEADERS[name]
    header = (*keys, *(f"{figure}, {what}" for what in ("before", "after") for figure in figures))
    title = f"{name}: commit {before['commit']} and {after['commit']}"
    return Table(title, header, rows, tuple(range(len(keys))))


_HEADERS = {
    "throughput": (("model", "context", "attention", "layout"), ("speed / dense", "peak / dense")),
    "generation": (("prompt", "batch", "model"), ("decode / dense",)),
    "convert": (("direction",), ("imports, s", "fixed, s", "s/GB over a copy's")),
    "operations": (("model", "layout", "variant, distance"), ("operations / consumer", "hidden states written")),
    "recovery": (("launch", "part"), ("median, s",)),
    "tokenize": (
        ("tokenizer", "input", "workers"),
        ("first word, s", "longest silence, s", "first shard, s", "CPU, s"),
    ),
}


def _comparable(name: str, result: Result) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    if name == "convert":
        return [
            (
                (row["direction"],),
                (shown(row["import_seconds"], 2), f"{row['fixed_seconds']:.2f}", f"{row['slope_over_copy']:.2f}"),
            )
            for row in result["rows"]
        ]
    if name == "operations":
        return [
            (
                (row["model"], row["layout"], row["variant"]),
                (f"{row['operations_beyond']:.2f}", f"{row['hidden_states_written_beyond']:.2f}"),
            )
            for row in result["rows"]
            if "operations_beyond" in row and "layout" in row
        ]
    if name == "recovery":
        faults = [(row["launch"], row["faults"]) for row in result["rows"] if "faults" in row]
        found = {
            (launch, part): statistics.median(fault["seconds"][part] for fault in its)
            for launch, its in faults
            for part in its[0]["seconds"]
        }
        for launch, its in faults:
            found[launch, "all"] = statistics.median(fault["all_seconds"] for fault in its)
            cpu = statistics.median(statistics.mean(fault["rank_cpu_seconds"]) for fault in its)
            found[launch, "CPU seconds of a rank until its first step"] = cpu
        return [(key, (f"{median:.2f}",)) for key, median in found.items()]
    if name == "tokenize":
        figures = ("first_word", "longest_silence", "first_shard", "cpu_seconds")
        return [
            (
                (row["tokenizer"], row["run"], str(row["workers"])),
                tuple(shown(row[figure], 2) for figure in figures),
            )
            for row in result["rows"]
            if "first_word" in row
        ]
    if name == "throughput":
        return [
            (
                (row["model"], str(row["context"]), row["variant"], row["layout"]),
                (shown(row["speed_over_dense"]), f"{peak_over_dense(row, result['rows']):.3f}"),
            )
            for row in result["rows"]
            if row["variant"] != "dense"
        ]
    return [
        ((str(row["prompt"]), str(row["batch"]), variant), (shown(ratio),))
        for row in result["rows"]
        for variant, ratio in row["decode_ratio"].items()
    ]
