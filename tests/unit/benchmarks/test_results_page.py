"""``docs/results.md``: what the committed files say, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results_page, throughput
from benchmarks.targets import before_and_after, targets


def row(variant: str, ratio: float, peak: int, context: int = 512) -> dict[str, Any]:
    """A row of throughput."""
    return {
        "model": "small",
        "context": context,
        "layout": "1x1",
        "variant": variant,
        "parameters": 1_500_000,
        "flops_a_step": 2e12,
        "sent_bytes_a_step": 0,
        "seconds": {"n": 3, "median": 1.0, "min": 0.9, "max": 1.1},
        "tokens_a_second": 512.0,
        "speed_over_dense": {"n": 3, "median": ratio, "min": ratio - 0.01, "max": ratio + 0.01},
        "peak_bytes": peak,
    }


def result(*rows: dict[str, Any], device: str = "cpu", commit: str = "abc") -> dict[str, Any]:
    """A result of throughput."""
    machine = {"device": device, "processor": "A processor", "cores": 2, "torch": "2.15.0", "megatron-core": "0.19.2"}
    return {
        "benchmark": "throughput",
        "command": "python -m benchmarks.throughput",
        "commit": commit,
        "date": "2026-11-20",
        "machine": machine,
        "settings": {"contexts": [512]},
        "rows": list(rows),
    }


DENSE, FULL, PRUNED = row("dense", 1.0, 1000), row("full", 0.98, 1010), row("pruned", 1.03, 990)


def test_the_committed_page_is_what_the_committed_files_say() -> None:
    results_page.main(["--check"])


def test_a_page_that_differs_is_found(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    results_page.main(["--out", str(page)])
    page.write_text(page.read_text().replace("not measured", "measured", 1))
    with pytest.raises(SystemExit, match="run python -m benchmarks.results_page"):
        results_page.main(["--check", "--out", str(page)])


def test_what_has_no_file_is_not_measured(tmp_path: Path) -> None:
    text = results_page.page(tmp_path, tmp_path)
    for section in results_page.SECTIONS:
        assert f"## {section.title}" in text
    assert text.count("not measured") >= 8 + len([s for s in results_page.SECTIONS if s.on_gpu])
    (tmp_path / "throughput-gpu.json").write_text(json.dumps(result(DENSE, FULL, PRUNED, device="A GPU")))
    text = results_page.page(tmp_path, tmp_path)
    assert "A GPU, 2 cores; torch 2.15.0, megatron-core 0.19.2; commit abc, 2026-11-20" in text
    throughput_gpu = next(section.on_gpu for section in results_page.SECTIONS if section.name == "throughput")
    assert throughput_gpu not in text


def test_each_picture_stands_once_below_the_longest_name_that_it_begins_with(tmp_path: Path) -> None:
    for stem, commit in (("throughput-cpu", "first"), ("throughput-cpu-4k", "second")):
        (tmp_path / f"{stem}.json").write_text(json.dumps(result(DENSE, FULL, PRUNED, commit=commit)))
    for stem in ("throughput-cpu", "throughput-cpu-more", "throughput-cpu-4k"):
        (tmp_path / f"{stem}.svg").touch()
    text = results_page.page(tmp_path, tmp_path)
    parts = {commit: text[text.index(f"commit {commit},") :].split("`python -m")[0] for commit in ("first", "second")}
    assert "(throughput-cpu.svg)" in parts["first"] and "(throughput-cpu-more.svg)" in parts["first"]
    assert "(throughput-cpu-4k.svg)" in parts["second"]
    for stem in ("throughput-cpu", "throughput-cpu-more", "throughput-cpu-4k"):
        assert text.count(f"({stem}.svg)") == 1


def test_targets_are_the_worst_row() -> None:
    slower = row("full", 0.90, 1200, context=1024)
    found = targets({"throughput": [result(DENSE, FULL, PRUNED, row("dense", 1.0, 1000, 1024), slower)]})
    by_name = {cells[0]: cells for cells in found.rows}
    assert by_name["training, `pruned`, tokens/s"][2:] == ("1.030 (1.020-1.040); 1 of 1", "not measured")
    assert by_name["training, `full`, tokens/s"][2] == "0.900 (0.890-0.910); 0 of 2"
    assert by_name["training, peak memory"][2] == "1.200; 2 of 3"
    assert by_name["generation, decoded tokens/s"][2:] == ("not measured", "not measured")


def test_decoding_has_a_target_for_each_kind() -> None:
    """By model and by whether it is compiled; results of before that was asked are not."""
    kinds = {
        ("narrow", None): 0.9,
        ("narrow", False): 0.95,
        ("narrow", True): 0.98,
        ("gpt2-124m", None): 1.02,
        ("gpt2-124m", True): 1.01,
    }
    results = []
    for (model, compiled), median in kinds.items():
        row = {"model": model, "decode_ratio": {"full": {"n": 3, "median": median, "min": 0.8, "max": 1.1}}}
        row |= {} if compiled is None else {"compiled": compiled}
        results.append({"machine": {"device": "cpu"}, "rows": [row]})
    spread = "(0.800-1.100)"
    assert [cells[2] for cells in targets({"generation": results}).rows[-4:]] == [
        *(f"1.020 {spread}; 1 of 1", f"1.010 {spread}; 1 of 1"),
        *(f"0.900 {spread}; 0 of 2", f"0.980 {spread}; 0 of 1"),
    ]


def test_decoding_has_a_target_against_transformers_own_model() -> None:
    """Of results that have a peer."""
    old = {"model": "narrow", "decode_ratio": {}}
    new = old | {"decode_over_peer": {"dense": {"n": 3, "median": 1.2, "min": 0.8, "max": 1.1}, "full": {}}}
    found = targets({"generation": [{"machine": {"device": "cpu"}, "rows": [old, new]}]})
    by_name = {cells[0]: cells for cells in found.rows}
    assert by_name["generation, dense against transformers' own model"][2] == "1.200 (0.800-1.100); 1 of 1"


def test_before_and_after_pairs_the_rows_that_both_have() -> None:
    before = result(DENSE, row("full", 0.95, 1100), commit="old")
    found = before_and_after("throughput", before, result(DENSE, FULL, PRUNED, commit="new"))
    assert found.title == "throughput: commit old and new"
    assert [tuple(cells) for cells in found.rows] == [
        ("small", "512", "full", "1x1", "0.950 (0.940-0.960)", "1.100", "0.980 (0.970-0.990)", "1.010")
    ]


def test_throughput_tables_and_plot_come_from_the_file_alone(tmp_path: Path) -> None:
    (table,) = throughput.tables(json.loads(json.dumps(result(DENSE, FULL, PRUNED))))
    assert table.title == "Training, one rank"
    assert [cells[8] for cells in table.rows] == ["1", "0.980 (0.970-0.990)", "1.030 (1.020-1.040)"]
    throughput.plot(result(DENSE, FULL, PRUNED), tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


def test_one_disturbed_round_does_not_widen_the_middle() -> None:
    """Quartiles of 1..9 by the definition of the exclusive method: 2.5, 5 and 7.5; one value is its own."""
    found = throughput.middle([1.0, 2, 3, 4, 5, 6, 7, 8, 900])
    assert found == {"n": 9, "median": 5, "min": 2.5, "max": 7.5}
    assert throughput.middle([2.0]) == {"n": 1, "median": 2.0, "min": 2.0, "max": 2.0}
