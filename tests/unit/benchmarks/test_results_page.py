"""``docs/results.md`` and the pages below it: what the committed files say, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results_page, throughput
from benchmarks.pages import claims, detail, front
from benchmarks.pages.sections import THEMES, TRAINING, page_of
from benchmarks.record import ROOT


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


def result(*rows: dict[str, Any], device: str = "cpu", commit: str = "0123456789ab") -> dict[str, Any]:
    """A result of throughput."""
    machine = {"device": device, "processor": "A(R) Processor", "cores": 2, "python": "3.12.1", "torch": "2.15.0"}
    return {
        "benchmark": "throughput",
        "command": "python -m benchmarks.throughput",
        "commit": commit,
        "date": "2026-11-20",
        "machine": machine | {"megatron-core": "0.19.2"},
        "settings": {"contexts": [512]},
        "rows": list(rows),
    }


DENSE, FULL, PRUNED = row("dense", 1.0, 1000), row("full", 0.98, 1010), row("pruned", 1.03, 990)


def lines(claimed: Iterable[claims.Claim], **results: list[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Title -> the cells beside it, of results by their benchmark."""
    files = {Path(f"{name}-{number}.json"): one for name, each in results.items() for number, one in enumerate(each)}
    return {claim.title: claim.cells(files)[1:] for claim in claimed}


def test_the_committed_pages_are_what_the_committed_files_say() -> None:
    results_page.main(["--check"])


def test_a_page_that_differs_is_found(tmp_path: Path) -> None:
    """A figure that was changed, in the first page or in another; and a page that none of these files makes."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "throughput-cpu.json").write_text(json.dumps(result(DENSE, FULL, PRUNED)))
    out = tmp_path / "results.md"
    command = ["--results", str(tmp_path / "results"), "--out", str(out)]
    results_page.main(command)
    training = tmp_path / "results" / "training.md"
    for page in (out, training):
        text = page.read_text()
        assert text.count("0.980 (0.970-0.990)") == 1
        page.write_text(text.replace("0.980", "0.990"))
        with pytest.raises(SystemExit, match=f"{page.name} is not what .*: run python -m benchmarks.results_page"):
            results_page.main([*command, "--check"])
        page.write_text(text)
    results_page.main([*command, "--check"])
    (tmp_path / "results" / "earlier.md").touch()
    with pytest.raises(SystemExit, match="earlier.md is no page .*: remove it"):
        results_page.main([*command, "--check"])


def test_a_file_that_cannot_be_traced_makes_no_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "throughput-cpu.json").write_text(json.dumps(result(DENSE, commit="0123456789ab+changes")))
    with pytest.raises(SystemExit) as ended:
        results_page.main(["--results", str(tmp_path), "--out", str(tmp_path / "results.md")])
    assert ended.value.code == 2
    expected = "throughput-cpu.json: commit 0123456789ab+changes: expected 12 hexadecimal digits"
    assert capsys.readouterr().err.splitlines()[-1].endswith(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["throughput-cpu.json"]


def test_the_first_page_is_short_and_begins_with_what_is_brought_and_cost() -> None:
    text = results_page.PAGE.read_text().splitlines()
    assert len(text) <= 120
    costs = text.index("## What it costs")
    assert text.index("## What it brings") < costs and "training speed" in "".join(text[costs : costs + 7])
    assert costs < 30


def test_every_file_is_on_a_page() -> None:
    pages = [results_page.PAGE, *results_page.PAGE.with_suffix("").glob("*.md")]
    linked = set(re.findall(r"\(\S*/benchmarks/results/([^)]+\.json)\)", "".join(page.read_text() for page in pages)))
    there = {path.name for path in results_page.RESULTS.glob("*.json")}
    assert linked == there


def test_what_has_no_file_is_not_measured(tmp_path: Path) -> None:
    """Each benchmark, with its commands; one that has a file on a GPU no longer."""
    out = tmp_path / "results.md"
    front = results_page.pages({}, tmp_path, out)[out]
    sections = [section for theme in THEMES for section in theme.sections]
    listed = front[front.index("## Not measured") :].splitlines()
    for section in sections:
        own = [line for line in listed if f"](results/{page_of(section)})" in line]
        assert len(own) == 1 + bool(section.on_gpu)
        assert f"on a CPU: `{section.command}`" in own[0] and section.on_gpu in own[-1]
    rows = [line for line in front.splitlines() if re.match(r"\| \[.*\]\(results/\S+\) \|", line)]
    assert len(rows) > 15 and all("| not measured | " in line for line in rows)
    on_gpu = {tmp_path / "throughput-gpu.json": result(DENSE, FULL, PRUNED, device="A GPU")}
    pages = results_page.pages(on_gpu, tmp_path, out)
    origin = "A GPU, 2 cores; torch 2.15.0, megatron-core 0.19.2; commit 0123456789ab, 2026-11-20; n 3; "
    assert f"{origin}[throughput-gpu.json](../throughput-gpu.json)" in pages[tmp_path / "results" / "training.md"]
    assert all(TRAINING.on_gpu not in text for text in pages.values())


def test_a_row_that_was_refused_is_listed(tmp_path: Path) -> None:
    """With its reason, and without where its result went."""
    refused = {"launch": "srun", "async_saves": True, "refused": "no --async-save without a GPU"}
    one = result(refused) | {"command": "python -m benchmarks.recovery --out x.json --overwrite --async-saves"}
    out = tmp_path / "results.md"
    text = results_page.pages({tmp_path / "recovery-cpu.json": one}, tmp_path, out)[out]
    assert "`python -m benchmarks.recovery --async-saves`: no --async-save without a GPU" in text


def test_a_newcomer_s_times_are_a_line(tmp_path: Path) -> None:
    """Where they were measured."""
    steps = {"first_loss": 20.4, "export": 301.0, "plan": 3.2}
    rows = [{"step": step, "seconds": {"n": 2, "median": s, "min": s - 1, "max": s + 1}} for step, s in steps.items()]
    text = front.page({tmp_path / "newcomer-cpu.json": result(*rows)}, tmp_path, tmp_path)
    assert "20 (19-21) s to the first loss, 301 (300-302) s to an export that was compared, 3 (2-4) s to" in text
    assert "; n 2; A." in text and "newcomer's path](" in text
    assert (
        "newcomer" not in front.page({}, tmp_path, tmp_path).replace("newcomers-path", "").split("## Not measured")[0]
    )


def test_grids_of_a_claim_that_have_no_file_are_listed(tmp_path: Path) -> None:
    """With the command of each, where other sweeps have files."""
    rows = [run(1, 5.0), run(1, 4.9, distances=[6], skip_groups=6)]
    text = front.page({tmp_path / "sweep-cpu-larger.json": result(*rows)}, tmp_path, tmp_path)
    listed = re.findall(r"on a CPU: `sla-sweep run examples/sweep/(\w+).yaml", text)
    assert listed == ["questions", "longer"]
    assert all((ROOT / "examples" / "sweep" / f"{name}.yaml").is_file() for name in [*listed, "larger"])


def test_the_picture_is_on_the_page_where_it_is_there(tmp_path: Path) -> None:
    out = tmp_path / "docs" / "results.md"
    assert "examples/sweep/longer.yaml" in results_page.pages({}, tmp_path, out)[out]
    (tmp_path / "sweep-cpu-longer-tokens.svg").touch()
    text = results_page.pages({}, tmp_path, out)[out]
    assert "](../sweep-cpu-longer-tokens.svg)" in text and "examples/sweep/longer.yaml" not in text


def test_each_picture_stands_once_below_the_longest_name_that_it_begins_with(tmp_path: Path) -> None:
    stems = {"throughput-cpu": "a" * 12, "throughput-cpu-4k": "b" * 12}
    files = {tmp_path / f"{stem}.json": result(DENSE, FULL, PRUNED, commit=commit) for stem, commit in stems.items()}
    pictures = ("throughput-cpu", "throughput-cpu-more", "throughput-cpu-4k")
    for stem in pictures:
        (tmp_path / f"{stem}.svg").touch()
    text = detail.page(THEMES[0], files, tmp_path)
    first, second = (text[text.index(f"commit {commit},") :].split("`python -m")[0] for commit in stems.values())
    assert "(throughput-cpu.svg)" in first and "(throughput-cpu-more.svg)" in first
    assert "(throughput-cpu-4k.svg)" in second
    assert all(text.count(f"({stem}.svg)") == 1 for stem in pictures)


def test_a_claim_is_its_worst_row() -> None:
    """By its median; of what is counted, the best beside it; and how many rows reach the aim."""
    slower = row("full", 0.90, 1200, context=1024)
    on_cpu = result(DENSE, FULL, PRUNED, row("dense", 1.0, 1000, 1024), slower)
    found = lines(claims.COSTS, throughput=[on_cpu, result(DENSE, FULL, PRUNED, device="A GPU")])
    pruned = found["training speed / dense's, `pruned`"]
    assert pruned[:2] == ("1.030 (1.020-1.040); n 3; A", "1.030 (1.020-1.040); n 3; A GPU")
    assert pruned[2:] == ("≥ 1.00", "CPU yes; GPU yes")
    full = found["training speed / dense's, `full`"]
    assert (full[0], full[3]) == ("0.900 (0.890-0.910); n 3; A", "CPU no, 0 of 2 rows; GPU no")
    assert found["peak memory of training / dense's"] == (
        *("1.200, best 0.990; counted; A", "1.010, best 0.990; counted; A GPU", "≤ 1.02"),
        "CPU no, 2 of 3 rows; GPU yes, 2 of 2 rows",
    )
    assert found["the same, a tiny model"] == ("not measured", "not measured", "≥ 1.00", "")


def test_decoding_is_claimed_of_tiny_models_and_of_others() -> None:
    """And of a dense model against transformers' own, where a result has that."""
    results = []
    for model, median in (("narrow", 0.9), ("narrow-llama", 0.95), ("gpt2-124m", 1.02), ("gpt2-124m", 1.01)):
        spread = {"n": 4, "median": median, "min": 0.8, "max": 1.1}
        own = {"model": model, "decode_ratio": {"full": spread}, "cache_ratio": {}}
        peer = {"decode_over_peer": {"dense": spread, "full": spread}} if model == "narrow-llama" else {}
        results.append(result(own | peer))
    found = lines([*claims.COSTS, *claims.TOOLS], generation=results)
    expected = ("1.010 (0.800-1.100); n 4; A", "not measured", "≥ 1.00", "CPU yes, 2 of 2 rows")
    assert found["decoding speed / dense's, GPT-2 124M"] == expected
    assert found["the same, a tiny model"][0] == "0.900 (0.800-1.100); n 4; A"
    assert found["the same, a tiny model"][3] == "CPU no, 0 of 2 rows"
    assert found["decoding speed of a dense export / transformers' own model"][0] == "0.950 (0.800-1.100); n 4; A"


def run(seed: int, loss: float, **setting: Any) -> dict[str, Any]:
    """A row of a sweep: dense, or with the setting that is given."""
    shape = {"size": "h64-l8", "context": 128, "num_layers": 8, "num_heads": 8, "num_groups": 8, "parameters": 1000}
    others = dict.fromkeys(("tokens", "training_loss", "perplexity", "tokens_per_second"), 1.0)
    return shape | others | {"seed": seed, "validation_loss": loss, "distances": [], "skip_groups": 0} | setting


def test_a_loss_is_that_of_the_default_setting_less_denses_of_its_seed() -> None:
    """Of -0.01, -0.02 and -0.03 the standard error is 0.0057735, and t of 2 degrees of freedom is 4.3027."""
    best = {"distances": [6], "skip_groups": 6}
    rows = [run(1, 5.0), run(2, 4.9), run(3, 5.1), run(1, 4.99, **best), run(2, 4.88, **best), run(3, 5.07, **best)]
    # None of these is --sla by itself.
    others = [run(1, 1.0, **best | {key: value}) for key, value in (("share", "values"), ("skip_groups", 8))]
    files = {Path("sweep-cpu-questions.json"): result(*rows, *others), Path("sweep-cpu.json"): result(*rows[:2])}
    loss = next(claim for claim in claims.BRINGS if claim.title.endswith(": code"))
    assert loss.cells(files)[1:] == (
        *("-0.0200 (-0.0448 to +0.0048); 3 seeds; A", "not measured", "interval below 0", "CPU no"),
    )


def test_one_seed_says_nothing_of_the_aim() -> None:
    run = result({"variant": "dense", "validation_loss": 4.5}, {"variant": "full", "validation_loss": 4.25})
    found = lines(claims.BRINGS, loss=[run])["the same: a short run of one seed"]
    assert found == ("-0.2500; 1 seed; A", "not measured", "interval below 0", "")


def test_bytes_that_are_not_the_formulas_miss_the_aim() -> None:
    hop = {"hidden_bytes": 100, "kv_bound_bytes": 60, "sent_bytes": {"sla": {"forward": [160], "backward": [160]}}}
    more = hop | {"sent_bytes": {"sla": {"forward": [160], "backward": [164]}}}
    row = {"sent_bytes": {"dense": 200, "sla": 320}, "hops": [hop]}
    found = lines(claims.COSTS, transport=[result(row, row | {"hops": [hop, more]})])
    title = "bytes between a pipeline's stages / dense's"
    assert found[title] == ("1.600; counted; A", "not measured", "exactly the formula's", "CPU no, 1 of 2 rows")


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
