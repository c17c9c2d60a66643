"""What benchmarks share, and what they make of a result: tables, plots, refusals.  Nothing is measured here."""

from __future__ import annotations

import argparse
import json
import shlex
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import convert, generation, hop_bytes, record, transport
from benchmarks.pipeline_models import Shape
from benchmarks.record import Table

SPREAD = {"n": 3, "median": 1.25, "min": 1.0, "max": 2.5}

HOP = {
    **{"hop": 0, "source_rank": 0, "target_rank": 1, "hidden_bytes": 100, "kv_bound_bytes": 60},
    **{"kv_planned_bytes": 60, "relay_bytes": 240, "padded_bytes": 320},
    "sent_bytes": {
        "dense": {"forward": [100], "backward": [100]},
        "sla": {"forward": [160], "backward": [160]},
    },
    "seconds": dict.fromkeys(("dense", "sla", "relay", "padded"), SPREAD),
    "seconds_over_sla": dict.fromkeys(("dense", "relay", "padded"), SPREAD),
}
ROWS: dict[ModuleType, dict[str, Any]] = {
    transport: {
        **{"layout": "PP=2", "pipeline_size": 2, "virtual_stages": 1, "distance": 6, "num_steps": 3},
        **{"seconds": {"dense": SPREAD, "sla": SPREAD}, "ratio": SPREAD},
        **{"sent_bytes": {"dense": 400, "sla": 640}, "synchronisations": {"dense": 4, "sla": 4}},
        "hops": [HOP],
        "ranks": [
            {
                **{"rank": 0, "resident_bytes": 0, "resident_planned_bytes": 0},
                "step_peak_bytes": {"dense": 1e6, "sla": 2e6},
            }
        ],
    },
    generation: {
        **{"model": "tiny", "prompt": 8, "batch": 1, "new_tokens": 5, "dtype": "fp32"},
        "variants": {
            variant: {
                **{"decode_tokens_per_second": SPREAD, "prefill_seconds": SPREAD},
                **{"cache_bytes": size, "formula_bytes": size},
            }
            for variant, size in (("dense", 1600), ("full", 1300), ("pruned", 1300))
        },
        **{"decode_ratio": {"full": SPREAD, "pruned": SPREAD}, "prefill_ratio": {"full": SPREAD, "pruned": SPREAD}},
        "cache_ratio": {"full": 0.8125, "pruned": 0.8125},
    },
    convert: {
        **{"direction": "megatron-to-hf", "variant": "full", "import_seconds": SPREAD, "fixed_seconds": 0.1},
        **{"seconds_per_gb": {"convert": 2.0, "copy": 1.0}, "slope_over_copy": 2.0},
        "sizes": [
            {
                **{"model": model, "parameters": 3e6, "source_bytes": 12e6, "result_bytes": 12e6},
                **{name: {"convert": SPREAD, "copy": SPREAD} for name in ("cpu_seconds", "seconds", "peak_bytes")},
            }
            for model in ("tiny", "narrow")
        ],
    },
}


def result_of(module: ModuleType) -> dict[str, Any]:
    return {"rows": [deepcopy(ROWS[module])], "machine": {"device": "some device"}}


def test_a_table_as_text_and_as_markdown() -> None:
    table = Table("Title", ("layout", "seconds"), [("PP=2", "1.5"), ("PP=16", "12.5")], note="Note.")
    lines = table.as_text().splitlines()
    assert (lines[0], lines[-1]) == ("Title", "Note.")
    assert [line.split() for line in lines[1:-1]] == [["layout", "seconds"], ["PP=2", "1.5"], ["PP=16", "12.5"]]
    assert table.as_markdown() == (
        "**Title**\n\n| layout | seconds |\n| :-- | --: |\n| PP=2 | 1.5 |\n| PP=16 | 12.5 |\n\nNote.\n"
    )


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_a_spread_is_in_order_and_counts(values: list[float]) -> None:
    found = record.spread(values)
    assert found["n"] == len(values)
    assert found["min"] == min(values) <= found["median"] <= max(values) == found["max"]


def test_shown() -> None:
    assert record.shown(SPREAD, 2) == "1.25 (1.00-2.50)"


def parsed(flags: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = record.add_output_args(argparse.ArgumentParser(), "some")
    return parser, parser.parse_args(flags)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.txt", "expected a name that ends in .json"),
        ("there.json", "is there: expected another name, or --overwrite"),
        ("there.json/x.json", "expected a folder that can be written"),
    ],
)
def test_output_is_refused(name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written."""
    (tmp_path / "there.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        record.check_output(*parsed(["--out", str(tmp_path / name)]))
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--out {tmp_path / name}" in last and last.endswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


def test_output_is_replaced_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("{}")
    record.check_output(*parsed(["--out", str(tmp_path / "there.json"), "--overwrite"]))
    record.check_output(*parsed(["--out", str(tmp_path / "new" / "x.json")]))
    assert (tmp_path / "new").is_dir()


def test_pictures_beside_a_benchmark_s_result(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """They go with a result that is replaced; another's picture stays."""
    out = tmp_path / "a.json"
    out.with_suffix(".svg").write_text("mine")
    parser, args = parsed(["--out", str(out), "--overwrite"])
    for there in (False, True):
        if there:
            out.write_text('{"mine": 1}')
        with pytest.raises(SystemExit):
            record.check_output(parser, args)
        assert "a.svg is there, and of no benchmark" in capsys.readouterr().err
    out.write_text('{"benchmark": "a"}')
    record.check_output(parser, args)


def test_a_result_says_where_it_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, args = parsed(["--out", str(tmp_path / "x.json")])
    args.layers, args.folder = 8, tmp_path
    written = record.write_result(args, "some", "some device", [{"a": 1}], lambda _: [Table("Title", ("a",), [("1",)])])
    assert json.loads((tmp_path / "x.json").read_text()) == written
    assert written["benchmark"] == "some" and written["rows"] == [{"a": 1}]
    assert written["settings"] == {"layers": 8, "folder": str(tmp_path)}
    assert written["machine"]["device"] == "some device" and written["machine"]["torch"]
    assert {"command", "commit", "date"} <= set(written)
    assert "Title" in capsys.readouterr().out


def test_the_command_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a shell, words with spaces included."""
    words = ["--note", "shared with other work", "--flags=--bf16 --sla"]
    monkeypatch.setattr("sys.argv", ["some_script.py", *words])
    assert shlex.split(record.command_line())[-3:] == words


@pytest.mark.parametrize("module", ROWS, ids=lambda module: module.__name__)
def test_tables_and_plot_need_the_result_alone(module: ModuleType, tmp_path: Path) -> None:
    """Every row has a cell for each column, and the figures are in them."""
    tables = module.tables(result_of(module))
    for table in tables:
        assert table.rows and all(len(row) == len(table.header) for row in table.rows)
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
    assert any(
        "1.25 (1.00-2.50)" in cell or "1.250 (1.000-2.500)" in cell for t in tables for r in t.rows for cell in r
    )
    module.plot(result_of(module), tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()[:2000]


def test_other_bytes_than_the_bound_are_named() -> None:
    row = result_of(transport)["rows"][0]
    assert transport.differences(row) == []
    # Another size in one of the microbatches.
    row["hops"][0]["sent_bytes"]["sla"]["backward"] = [160, 161]
    assert transport.differences(row) == ["PP=2, hop 0, sla, backward: sent [160, 161], bound 160"]
    row = result_of(transport)["rows"][0]
    row["hops"][0]["kv_planned_bytes"] = 80
    assert transport.differences(row) == ["PP=2, hop 0: K/V planned 80, bound 60"]
    row = result_of(transport)["rows"][0]
    row["hops"][0]["sent_bytes"]["dense"]["forward"] = []
    assert len(transport.differences(row)) == 1


@given(st.integers(2, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from([4, 6, 8]), st.data())
def test_the_formula_is_what_is_planned(ranks: int, chunks: int, each: int, heads: int, data: st.DataObject) -> None:
    """The bound's formula and the planner, which share nothing, agree; no way sends less than the bound."""
    layers = ranks * chunks * each
    distance = data.draw(st.integers(1, layers - 1))
    hops = hop_bytes.hop_bytes(Shape(layers, 8 * heads, heads, 16, distance, 2 * ranks, ranks, chunks), 2)
    assert len(hops) == ranks * chunks - 1
    for hop in hops:
        assert hop.kv_bound == hop.kv_planned
        assert hop.hidden <= hop.sizes["sla"] <= min(hop.relay, hop.padded)
    if chunks == 1:
        assert all(hop.relay == hop.sizes["sla"] for hop in hops)


def test_what_conversions_are_made_of() -> None:
    """Made up: imports of 3 s, 0.4 s of other work, 2 s a GB; the copy takes 0.5 s a GB, and 0.1 s otherwise."""

    def runs(gb: float) -> dict[str, list[dict[str, float]]]:
        rest = {"seconds": 9.0, "peak_bytes": 1e9, "source_bytes": gb * 1e9, "result_bytes": gb * 1e9}
        converted = [{"import_seconds": 3.0 + late, "cpu_seconds": 3.4 + late + 2 * gb, **rest} for late in (0, 0.5, 1)]
        return {"convert": converted, "copy": [{"import_seconds": 0.02, "cpu_seconds": 0.12 + 0.5 * gb, **rest}]}

    parameters = {"small": 1, "large": 2}
    row = convert.row_of("megatron-to-hf", "full", {"small": runs(0.5), "large": runs(1.5)}, parameters)
    assert (row["import_seconds"]["n"], row["import_seconds"]["median"]) == (6, 3.5)
    assert row["fixed_seconds"] == pytest.approx(0.4)
    assert row["seconds_per_gb"] == pytest.approx({"convert": 2.0, "copy": 0.5})
    assert row["slope_over_copy"] == pytest.approx(4.0)
