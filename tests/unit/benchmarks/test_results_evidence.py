"""Every figure of the results pages can be followed to a file that says what measured it, where and how often."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pages.evidence import problems, spreads
from benchmarks.record import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
FRONT = ROOT / "docs" / "results.md"
DETAILS = sorted(FRONT.with_suffix("").glob("*.md"))
#: Has differences of runs of other pages in place of rows.
PAPER = FRONT.with_suffix("") / "paper.md"

#: ``1.001 (0.959-1.018)``
SPREAD = re.compile(r"(?<![\d.])(\d[\d.]*) \((\d[\d.]*)-(\d[\d.]*)\)")
#: The line above the tables of a file.
ORIGIN = re.compile(r"^(.+), (\d+) cores; .*; commit ([0-9a-f]{12}), ([\d-]{10}); (.+); \[[^\]]+\]\((\S+\.json)\)$")
SAMPLE = re.compile(r"n \d+(-\d+)?|\d+ (seed|fault)s?|counted: exact|refused")


def blocks(page: Path, text: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Of a page of rows: the line of a file's origin, the file, and what is said of it; what belongs to none last."""
    origin, body, loose = "", [], []
    for line in [*text.splitlines(), "## "]:
        if (found := ORIGIN.match(line)) or line.startswith("## "):
            if origin:
                yield origin, json.loads((page.parent / ORIGIN.match(origin)[6]).read_text()), "\n".join(body)
            origin, body = line if found else "", []
        else:
            (body if origin else loose).append(line)
    yield "", {"rows": []}, "\n".join(loose)


def untraced(page: Path, text: str) -> list[str]:
    """What of a page of rows is not as its files say: a line for each origin and each median with its spread."""
    wrong = []
    for origin, result, body in blocks(page, text):
        if origin and not is_origin(origin, result):
            wrong.append(origin)
        found = list(spreads(result["rows"]))
        # A line with ± is of losses: its least and most are runs' own.
        losses = {f"{row['validation_loss']:.4f}" for row in result["rows"] if "validation_loss" in row}
        for line in body.splitlines():
            for median, least, most in SPREAD.findall(line):
                if not ({least, most} <= losses if "±" in line else measured(found, median, least, most)):
                    wrong.append(f"{median} ({least}-{most}) in {line}")
    return wrong


def is_origin(line: str, result: dict[str, Any]) -> bool:
    """Whether ``line`` says of ``result`` where, by what and how often it was measured."""
    device, cores, commit, date, sample, _ = ORIGIN.match(line).groups()
    machine = result["machine"]
    name = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    words = re.sub(r"\((R|TM)\)|\bProcessor\b", "", name).split()
    said = (device.split(), int(cores), commit, date)
    return said == (words, machine["cores"], result["commit"], result["date"]) and bool(SAMPLE.fullmatch(sample))


def measured(found: list[dict[str, float]], *figures: str) -> list[dict[str, float]]:
    """Those whose median, least and most are ``figures``, in seconds or milliseconds."""
    digits = len(figures[0].partition(".")[2])
    return [
        spread
        for spread in found
        for scale in (1, 1000)
        if tuple(f"{spread[what] * scale:.{digits}f}" for what in ("median", "min", "max")) == figures
    ]


def claimed(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Of the first page: link, figure, of how many, device, for each that was measured."""
    for line in text.splitlines():
        if found := re.match(r"\| \[.+?\]\((\S+)\) \|(.*)\|", line):
            for cell in found[2].split(" | ")[:2]:
                if "; " in cell:
                    yield (found[1], *cell.strip().split("; "))


def unclaimed(text: str) -> list[str]:
    """Figures of the first page that the rows they link to do not have, on that device, with that number of runs."""
    wrong = []
    for link, figure, sample, device in claimed(text):
        path, _, anchor = link.partition("#")
        page = FRONT.parent / path
        parts = {slug(part.splitlines()[0]): part for part in page.read_text().split("\n## ")[1:]}
        wanted = re.findall(r"(?<!\d)[-+]?\d+\.\d+", figure)
        own = [each for each in blocks(page, "## " + parts[anchor]) if each[0].startswith(device)]
        if sample == "counted":
            # The best row may be another file's than the worst.
            is_there = has_all(wanted, "".join(body for *_, body in own))
        else:
            is_there = any(has_all(wanted, body) and is_of(sample, figure, result) for _, result, body in own)
        if not is_there:
            wrong.append(f"{link}: {figure}; {sample}; {device}")
    return wrong


def has_all(numbers: list[str], body: str) -> bool:
    """Whether each is in ``body`` as a number of its own."""
    return all(re.search(rf"(?<![\d.]){re.escape(number.lstrip('+'))}(?!\d)", body) for number in numbers)


def is_of(sample: str, figure: str, result: dict[str, Any]) -> bool:
    """Whether ``result`` measured ``figure`` as often as ``sample`` says."""
    number, rows = re.search(r"\d+", sample), result["rows"]
    if sample.startswith("n "):
        found = measured(list(spreads(rows)), *SPREAD.search(figure).groups())
        return int(number[0]) in [spread["n"] for spread in found]
    if "seed" in sample:
        return int(number[0]) == len({row["seed"] for row in rows})
    return int(number[0]) in [len(row["faults"]) for row in rows if "faults" in row]


def slug(title: str) -> str:
    """A heading's anchor."""
    return re.sub(r"[^\w -]", "", title.strip("# ").lower()).replace(" ", "-")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_file_says_where_its_figures_come_from(path: Path) -> None:
    assert problems(json.loads(path.read_text())) == []


def change(*keys: str | int, to: Any = None) -> Callable[[dict[str, Any]], None]:
    """A change of a result: the value at ``keys`` is ``to``, or gone."""

    def changed(result: Any) -> None:
        *way, last = keys
        for key in way:
            result = result[key]
        if to is None:
            del result[last]
        else:
            result[last] = to

    return changed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (change("commit"), "no commit"),
        (change("commit", to="0123456789ab+changes"), "commit 0123456789ab+changes"),
        (change("commit", to="unknown"), "commit unknown"),
        (change("command", to=""), "no command"),
        (change("command", to="python -m benchmarks.throughput --out /tmp/x.json"), "a path of one machine"),
        (change("settings", "folder", to="~/runs"), "a path of one machine"),
        (change("date", to="yesterday"), "date yesterday"),
        (change("rows", to=[]), "no rows"),
        (change("machine", "processor"), "machine: no processor"),
        (change("machine", "cores"), "machine: no cores"),
        (change("rows", 1, "speed_over_dense", "n"), "a median without n"),
        (change("rows", 1, "speed_over_dense", "n", to=0), "a median without n"),
        (change("rows", 1, "speed_over_dense", "min", to=2.0), "a median without n, or not between"),
        (change("rows", 1, to={"variant": "full", "tokens_a_second": 100.0}), "row 1: no n"),
    ],
    ids=lambda value: value.replace(" ", "-").replace(":", "") if isinstance(value, str) else "",
)
def test_a_file_that_leaves_something_open_is_found(changed: Callable[[dict[str, Any]], None], said: str) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "throughput-cpu.json").read_text())
    broken = copy.deepcopy(result)
    changed(broken)
    assert problems(result) == [] and problems(broken)[0].startswith(said)


@pytest.mark.parametrize("page", [page for page in DETAILS if page != PAPER], ids=lambda page: page.stem)
def test_rows_are_traced_to_their_files(page: Path) -> None:
    assert untraced(page, page.read_text()) == []


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("training", r"(\| 1\.0\d)(\d) \(", r"\g<1>5\g<2> ("),
        ("training", r"commit ([0-9a-f]{11})[0-9a-f],", r"commit \g<1>x,"),
        ("training", r"; n 10; \[", r"; ["),
        ("generation", r"-1\.(\d\d\d)\) \|", r"-2.\g<1>) |"),
        ("loss", r"± (\d\.\d+) \(4", r"± \g<1> (3"),
        ("domains", r"2 cores", "64 cores"),
    ],
    ids=["median", "commit", "n", "most", "least-of-seeds", "cores"],
)
def test_rows_that_were_changed_are_found(name: str, old: str, new: str) -> None:
    """In a copy of a page one thing is another; where it is the line of the origin, its tables have none."""
    page = FRONT.with_suffix("") / f"{name}.md"
    broken, count = re.subn(old, new, page.read_text(), count=1)
    assert count == 1 and untraced(page, broken) != []


def test_the_paper_s_page_says_which_files_it_sums_up() -> None:
    """Those that it links to: how many runs, when, and at which commits."""
    found = re.findall(r"^\* \[.*?\]\((\S+\.json)\): (\d+) runs, (.*)$", PAPER.read_text(), re.MULTILINE)
    assert found
    for path, runs, rest in found:
        result = json.loads((PAPER.parent / path).read_text())
        commits = {result["commit"], *(row["commit"] for row in result["rows"] if "commit" in row)}
        assert int(runs) == len(result["rows"]) and result["date"] in rest and all(each in rest for each in commits)


def test_claims_are_traced_to_rows() -> None:
    text = FRONT.read_text()
    assert len(list(claimed(text))) >= 15
    assert unclaimed(text) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [(r"\| 0\.9(\d\d) \(", r"| 1.9\g<1> ("), (r"; n (\d+);", r"; n 1\g<1>;"), (r"; AMD EPYC", "; NVIDIA H200")],
    ids=["figure", "n", "device"],
)
def test_claims_that_were_changed_are_found(old: str, new: str) -> None:
    broken, count = re.subn(old, new, FRONT.read_text(), count=1)
    assert count == 1 and len(unclaimed(broken)) == 1


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """File and anchor of each link within the repository."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        yield (page.parent / path).resolve() if path else page, anchor


def test_links_lead_somewhere() -> None:
    """Of these pages all, and of all other pages those to them: files and headings."""
    pages = {FRONT, *DETAILS}
    others = [page for folder in ("docs", "examples", "launch", "patches") for page in (ROOT / folder).rglob("*.md")]
    found = [(page, *link) for page in sorted({ROOT / "README.md", *others, *pages}) for link in links(page)]
    checked = [(page, file, anchor) for page, file, anchor in found if page in pages or file in pages]
    assert len(checked) > 60
    for page, file, anchor in checked:
        assert file.exists(), (page, file)
        titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(slug, titles), (page, file, anchor)
