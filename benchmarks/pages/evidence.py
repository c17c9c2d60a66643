"""What a result file must say of where its figures come from, and the line in which a page repeats it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from typing import Any

Result = dict[str, Any]

#: What every file has, beside its rows.
FIELDS = ("benchmark", "command", "commit", "date", "machine", "settings", "rows")

#: Of a machine; at least one version stands beside them.
MACHINE = ("device", "processor", "cores")
VERSIONS = ("torch", "megatron-core", "transformers")

#: Benchmarks that count: their figures are the same on every machine and in every run.
COUNTED = ("operations",)

#: A path from a machine's root or someone's home, by itself or as a flag's value.
_MACHINE_PATH = re.compile(r"""(?:^|[\s='":,])(?:/|~/)\w""")


def problems(result: Result) -> list[str]:
    """A line for each thing that ``result`` leaves open of its figures; none if they can be traced."""
    if missing := [field for field in FIELDS if not result.get(field) and field != "settings"]:
        return [f"no {field}" for field in missing]
    found = [f"machine: no {what}" for what in MACHINE if not result["machine"].get(what)]
    if not any(result["machine"].get(what) for what in VERSIONS):
        found.append(f"machine: none of {', '.join(VERSIONS)}")
    commits = sorted({result["commit"], *(row["commit"] for row in result["rows"] if "commit" in row)})
    found += [
        f"commit {commit}: expected 12 hexadecimal digits" for commit in sorted(commits) if not _is_commit(commit)
    ]
    try:
        date.fromisoformat(result["date"])
    except ValueError:
        found.append(f"date {result['date']}: expected year-month-day")
    found += [f"a path of one machine: {text}" for text in _texts(result) if _MACHINE_PATH.search(text)]
    for spread in spreads(result["rows"]):
        if not (spread.get("n", 0) >= 1 and spread.get("min", 1) <= spread["median"] <= spread.get("max", 0)):
            found.append(f"a median without n, or not between least and most: {spread}")
    if result["benchmark"] not in COUNTED:
        found += [f"row {number}: no n" for number, row in enumerate(result["rows"]) if not _has_number(row)]
    return found


def _is_commit(text: str) -> bool:
    """Not ``+changes``: nobody has these."""
    return re.fullmatch("[0-9a-f]{12}", text) is not None


def _has_number(row: Result) -> bool:
    """Whether it says how often something was measured, is one of several seeds, or was refused."""
    return bool({"seed", "refused", "not_measured"} & set(row)) or next(spreads(row), None) is not None


def spreads(value: Any) -> Iterator[dict[str, float]]:
    """Every median with its ``n``, least and most, wherever it is."""
    if isinstance(value, dict) and "median" in value:
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from spreads(each)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def sample(result: Result) -> str:
    """Of how many runs, seeds or faults its figures are: ``n 9-16``, ``5 seeds``."""
    rows = result["rows"]
    if result["benchmark"] in COUNTED:
        return "counted: exact"
    if seeds := {row["seed"] for row in rows if "seed" in row}:
        return _plural(len(seeds), "seed")
    if faults := [len(row["faults"]) for row in rows if "faults" in row]:
        return _plural(sum(faults), "fault")
    numbers = [int(spread["n"]) for spread in spreads(rows)]
    if not numbers:
        return "refused"
    return f"n {min(numbers)}" if min(numbers) == max(numbers) else f"n {min(numbers)}-{max(numbers)}"


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")


def is_on_gpu(result: Result) -> bool:
    """Whether it was measured on a GPU."""
    return result["machine"]["device"] != "cpu"


def device(result: Result) -> str:
    """The GPU, or the processor, without trade marks: ``Intel Xeon``."""
    machine = result["machine"]
    name = machine["device"] if is_on_gpu(result) else machine["processor"]
    return re.sub(r"\((?:R|TM)\)|\bProcessor\b", "", name).strip()


def origin(result: Result) -> str:
    """Device, cores, versions, commit, date and n, in a line."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in VERSIONS if name in machine)
    return (
        f"{device(result)}, {machine['cores']} cores; {versions}; commit {result['commit']}, {result['date']}; "
        f"{sample(result)}"
    )
