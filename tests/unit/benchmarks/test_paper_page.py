"""``docs/results/paper.md``: answers follow from figures by rule; what has no file is not measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import paper_page, positions
from benchmarks.comparisons import against_dense, holm
from benchmarks.paired import difference
from benchmarks.paper_sections import Ledger, not_holding, says
from benchmarks.record import ROOT

RESULTS = ROOT / "benchmarks" / "results"
#: Setting of eight layers and eight heads -> its distances, skip groups, and consumer layers.
SETTINGS: dict[str, tuple[list[int], int, str | None]] = {
    "dense": ([], 0, None),
    "paper's": ([6], 6, None),
    "near": ([2], 6, None),
    "other reading": ([1], 6, "3-8"),
    "several": ([2, 6], 6, None),
}
#: What a seed adds to every difference, so that they spread: 0 on average, s = 0.001.
SPREAD = {1: -0.001, 2: 0.0, 3: 0.001}


def row(setting: str, seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    distances, groups, layers = SETTINGS[setting]
    return {
        **{"size": "code", "context": 128, "seed": seed, "distances": distances, "skip_groups": groups},
        **{"kv_projection": "full", "layers": layers, "num_layers": 8, "num_heads": 8, "num_groups": 8},
        **{"tokens": 220, "parameters": 1000, "validation_loss": loss, "training_loss": loss, "perplexity": 9.0},
        **{"tokens_per_second": 1.0, "commit": "abc", "name": f"{setting}-s{seed}"},
    } | changes


def rows(below: dict[str, float], **changes: Any) -> list[dict[str, Any]]:
    """Three seeds on two texts: each setting so far from dense; seeds' own losses are far apart."""
    return [
        row(setting, seed, 5 + seed + (apart + SPREAD[seed] if setting != "dense" else 0), size=size, **changes)
        for setting, apart in {"dense": 0.0, **below}.items()
        for size in ("code", "prose")
        for seed in SPREAD
    ]


def result(found: list[dict[str, Any]]) -> dict[str, Any]:
    machine = {"device": "cpu", "processor": "A processor", "cores": 2}
    return {"machine": machine, "command": "python -m x", "commit": "def", "date": "2026-11-27", "rows": found}


QUESTIONS = {"paper's": -0.02, "near": 0.0, "other reading": 0.02, "several": -0.01}


def text_of(**files: list[dict[str, Any]]) -> str:
    named = {Path(f"results/{stem.replace('_', '-')}.json"): result(found) for stem, found in files.items()}
    return paper_page.page(named, Path("docs/results"))


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_without_files_nothing_is_claimed() -> None:
    text = paper_page.page({}, ROOT / "docs" / "results")
    # Eight sections, each also in the list of answers at the top, and the list of what does not hold.
    assert text.count("Not measured.") == 17 and "No comparison has an interval yet." in text
    assert "below dense with" not in text and "[Sweeps](../sweep.md)" in text


def test_answers_follow_from_the_figures() -> None:
    """Six pairs each: -0.02, s = 0.000894, over sqrt(6) times 2.5706: 0.0009."""
    text = text_of(sweep_cpu_questions=rows(QUESTIONS))
    shares = section(text, "Shares of layers and of heads")
    assert "Of 2 shares 1 are below dense with an interval that excludes 0, 0 above; 1 differ by no more" in shares
    assert "distance 6, 6 of 8 heads: below dense in 6 of 6 pairs, mean -0.0200, interval excludes 0" in shares
    assert "-0.0200 (-0.0209 to -0.0191) | < 0.001 | 6 of 6" in shares
    # Three seeds of one text: s = 0.001, over sqrt(3) times 4.3027: 0.0025.
    assert "| 6 | 6/8 | -0.0200 (-0.0225 to -0.0175) | -0.0200 (-0.0225 to -0.0175) |" in shares
    # Pair by pair there is no spread between two settings.
    assert "+0.0200 (+0.0200 to +0.0200)" in shares
    assert "less the long distance: above in 1 of 1" in section(text, "Both readings")
    assert "distance 2+6, 6 of 8 heads: below dense in 6 of 6 pairs" in section(text, "Several distances")
    assert "Not measured." in section(text, "Larger models")
    top = text.split("\n## ")[0]
    assert "* [Both readings](#both-readings): The reading in which each layer skips a short way, less the long" in top
    assert "differ by no more than they spread.\n* [Both" in top


def test_other_figures_make_other_answers() -> None:
    """The same page of the opposite signs."""
    text = text_of(sweep_cpu_questions=rows({name: -apart for name, apart in QUESTIONS.items()}))
    shares = section(text, "Shares of layers and of heads")
    assert "Of 2 shares 0 are below dense with an interval that excludes 0, 1 above" in shares
    assert "above dense, below it in 0 of 6 pairs, mean +0.0200" in shares
    assert "less the long distance: below in 1 of 1" in section(text, "Both readings")


def test_what_does_not_hold_is_listed() -> None:
    """Each claim whose interval is not below 0, once, and no other; what compares two settings is no claim."""
    text = section(text_of(sweep_cpu_questions=rows(QUESTIONS)), "What does not hold")
    assert re.findall(r"^\| (shares|readings|several distances) \| ([^|]*) \| ([^|]*) \|", text, re.MULTILINE) == [
        *(("shares", "distance 2, 6 of 8 heads", where) for where in ("code", "prose", "all texts")),
        ("readings", "distance 1, 6 of 8 heads, layers 3-8, 8 layers, context 128, 220 tokens", "all texts"),
    ]
    # Three of each of two shares, the other reading on all texts, three of the several distances.
    assert "**4 of 10:" in text


def test_growth_is_paired() -> None:
    """From -0.01 at 128 to -0.03 at 1024: -0.02 in each pair, whatever the seeds' own losses are."""
    found = [*rows({"paper's": -0.01}), *rows({"paper's": -0.03}, context=1024)]
    answer = section(text_of(sweep_cpu_longer=found), "Longer contexts")
    assert "the difference to dense at 1024 less that at 128: below 0 in 6 of 6 pairs, mean -0.0200" in answer


def test_two_sizes() -> None:
    """The default of twelve layers is distance 9: it is found by its share."""
    small = rows({"paper's": -0.02})
    large = [
        one | {"num_layers": 12, "distances": [9] if one["distances"] else [], "parameters": 4000} for one in small
    ]
    for one in large:
        one["validation_loss"] += 0.01 * bool(one["distances"])
    answer = section(text_of(sweep_cpu_questions=small, sweep_cpu_larger=large), "Larger models")
    assert "The paper's shares, the larger model's difference to dense less the smaller's: above 0" in answer
    assert "| 12 | 4,000 | distance 9, 6 of 8 heads | all texts | -0.0100" in answer


def test_positions_are_paired_over_texts() -> None:
    """Late positions gain 0.02, and early ones nothing."""
    made = []
    for one in rows({"paper's": 0.0}):
        losses = [3.0 + one["seed"] + SPREAD[one["seed"]] * bool(one["distances"])] * 16
        late = [loss - 0.02 * bool(one["distances"]) for loss in losses]
        made.append(positions.row_of(one, losses + late, 1, one["validation_loss"]))
    answer = section(text_of(positions_cpu=made), "Loss by position")
    assert "difference to dense at 17-32 less that at 1-16: below 0 in 6 of 6 pairs, mean -0.0200" in answer


def test_words_of_a_difference() -> None:
    assert says(difference([-0.1])) == "-0.1000 to dense in one pair, no interval"
    assert says(difference([-1.0, 1.0])).startswith("no difference to dense beyond the spread, +0.0000 (-12.7062 to")
    assert not_holding([]) == "Not measured.\n"


def test_a_comparison_that_stands_twice_is_one() -> None:
    ledger = Ledger()
    (one, *_) = against_dense(result(rows(QUESTIONS)))
    assert ledger.cells("first", one.together) == ledger.cells("second", one.together)
    assert [entry.question for entry in ledger.made] == ["first"]


def test_holm() -> None:
    """By hand: 0.005 <= 0.05 / 4, 0.01 <= 0.05 / 3, 0.03 > 0.05 / 2, and there it stops."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == 2
    assert holm([0.04, 0.01, 0.02]) == 3 and holm([0.06]) == 0 and holm([]) == 0


def test_every_figure_of_the_committed_files_is_their_rows() -> None:
    """Means of the methods' table, by hand from the rows."""
    path = RESULTS / "sweep-cpu-methods.json"
    found = json.loads(path.read_text())
    dense = {each["seed"]: each["validation_loss"] for each in found["rows"] if not _is_sla(each)}
    named = {Path(path.name): found}
    text = section(paper_page.page(named, Path()), "Other methods")
    values = [
        each["validation_loss"] - dense[each["seed"]]
        for each in found["rows"]
        if each.get("label") == "SkipV1Former" and each["kv_projection"] == "full"
    ]
    assert f"| SkipV1Former, values alone | 662,144 | {sum(values) / len(values):+.4f} (" in text
    assert "| 5 of 5 |" in text and len(values) == 5


def _is_sla(each: dict[str, Any]) -> bool:
    return bool(each["distances"] or each.get("sources"))


@pytest.mark.parametrize("stem", paper_page.SOURCES)
def test_the_page_links_what_it_read(stem: str) -> None:
    path = RESULTS / f"{stem}.json"
    if not path.is_file():
        pytest.skip("not measured yet")
    text = paper_page.page({path: json.loads(path.read_text())}, ROOT / "docs" / "results")
    assert f"* [{stem}](../../benchmarks/results/{stem}.json): " in text
