"""Each benchmark runs at a tiny size; its figures are checked where they are exact, and for being honest."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.benchmarks import run_benchmark
from tests.support.launch import ROOT

pytestmark = pytest.mark.distributed

#: Layers, width and positions of the shapes ``tiny`` and ``narrow``.
SIZES = ((4, 64, 64), (12, 96, 1024))


def run(name: str, folder: Path, *flags: str) -> dict[str, Any]:
    """What ``python -m benchmarks.NAME`` writes, once it has printed its tables; checked for honesty."""
    out = folder / f"{name}.json"
    result, printed = run_benchmark(name, out, *flags)
    assert (result["benchmark"], result["machine"]["device"]) == (name, "cpu")
    assert result["command"].startswith(f"python -m benchmarks.{name} --out ")
    assert result["commit"] and result["date"] and result["rows"]
    assert {"torch", "megatron-core", "transformers", "python", "processor", "threads"} <= set(result["machine"])
    spreads = list(spreads_in(result["rows"]))
    assert spreads
    for spread in spreads:
        assert spread["n"] >= 1 and 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert out.with_suffix(".svg").stat().st_size > 1000
    assert str(out) in printed
    return result


def spreads_in(value: Any) -> Iterator[dict[str, float]]:
    """Every median with its least and most, wherever it is."""
    if isinstance(value, dict) and "median" in value:
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from spreads_in(each)


def test_throughput(tmp_path: Path) -> None:
    """Every variant and layout; operations and bytes are the formula's; the memory of dense is that of its tensors."""
    flags = ("--models", "tiny", "--contexts", "32", "--layouts", "1x1", "2x2", "--microbatches", "2", "--rounds", "3")
    rows = run("throughput", tmp_path, *flags, "--device", "cpu")["rows"]
    assert [(row["layout"], row["variant"]) for row in rows] == [
        (layout, variant) for layout in ("1x1", "2x2") for variant in ("dense", "full", "pruned")
    ]
    # Of 4 layers of width 64 and 4 groups of 16, the last leaves out K and V of 3 groups; 4096 words, 32 positions.
    dense_parameters = 4 * (12 * 64**2 + 13 * 64) + (4096 + 32) * 64 + 2 * 64
    dead = 2 * 3 * 16 * 65
    tokens, pruned_away = 2 * 32, 2 * 3 * 16 * 64
    attention = 4 * 2 * 2 * 32**2 * 64
    dense_flops = 3 * (2 * tokens * (4 * 12 * 64**2 + 4096 * 64) + attention)
    for row in rows:
        is_pruned = row["variant"] == "pruned"
        # Over two stages the embedding of words is there twice.
        copies = 4096 * 64 if row["layout"] == "2x2" else 0
        assert row["parameters"] == dense_parameters + copies - dead * is_pruned
        assert row["flops_a_step"] == dense_flops - 3 * 2 * tokens * pruned_away * is_pruned
        assert row["seconds"]["n"] == row["speed_over_dense"]["n"] == 3
        assert row["tokens_a_second"] == tokens / row["seconds"]["median"]
        # Weights, gradients and two moments in fp32, on the rank that has most.
        assert row["held_bytes"] >= 16 * row["parameters"] // (1 if row["layout"] == "1x1" else 2)
        # Of several ranks not the same one need have most of each.
        most = row["held_bytes"] + row["step_bytes"]
        assert row["peak_bytes"] == most if row["layout"] == "1x1" else row["held_bytes"] < row["peak_bytes"] <= most
        assert row["step_bytes"] > 4 * 32 * 4096
        # K/V that are joined take the place of the projection that they are taken from.  The count varies by a small
        # tensor from run to run; a hidden state has 8192 bytes.
        assert row["layout"] != "1x1" or row["step_bytes"] < rows[0]["step_bytes"] + 1024
    # Hidden states over three hops; K/V of layer 1 (3 groups of 16) ride the first, then wait for the last stage.
    hidden, kv = 4 * 32 * 64, 4 * 2 * 32 * 3 * 16
    assert [row["sent_bytes_a_step"] for row in rows[3:]] == [4 * 3 * hidden] + [4 * (3 * hidden + kv)] * 2
    assert [row["sent_bytes_a_step"] for row in rows[:3]] == [0, 0, 0]


def test_transport(tmp_path: Path) -> None:
    """Bytes are the formula's, resident K/V the plan's; no host synchronisation is added; every timed run is there."""
    sizes = ("--layers", "8", "--hidden", "32", "--heads", "4", "--seq-length", "16", "--microbatches", "2")
    runs = ("--steps", "2", "--transfers", "3", "--warmup", "1", "--virtual-stages", "1", "2", "--device", "cpu")
    plain, interleaved = run("transport", tmp_path, "--ranks", "2", *sizes, *runs)["rows"]
    assert (plain["layout"], interleaved["layout"]) == ("PP=2", "PP=2 x VPP=2")
    # Of fp32, K/V of 3 groups of layers 1 and 2.
    hidden, kv = 4 * 16 * 32, 4 * 2 * (2 * 16 * 3 * 8)
    for row, crossing in ((plain, [kv]), (interleaved, [kv, 0, 0])):
        assert [hop["kv_bound_bytes"] for hop in row["hops"]] == crossing
        assert [hop["kv_planned_bytes"] for hop in row["hops"]] == crossing
        for hop, its in zip(row["hops"], crossing, strict=True):
            assert hop["sent_bytes"]["dense"] == {"forward": [hidden], "backward": [hidden]}
            assert hop["sent_bytes"]["sla"] == {"forward": [hidden + its], "backward": [hidden + its]}
            assert {way: figures["n"] for way, figures in hop["seconds"].items()} == dict.fromkeys(
                ("dense", "sla", "relay", "padded"), 3
            )
        # Forward and backward of 2 microbatches.
        assert row["sent_bytes"]["dense"] == 2 * 2 * len(crossing) * hidden
        assert row["sent_bytes"]["sla"] == 2 * 2 * (len(crossing) * hidden + sum(crossing))
        assert row["synchronisations"]["sla"] == row["synchronisations"]["dense"] > 0
        assert row["num_steps"] == row["ratio"]["n"] == row["seconds"]["sla"]["n"] == 2
        for rank in row["ranks"]:
            assert rank["resident_bytes"] == rank["resident_planned_bytes"]
            assert 0 < min(rank["step_peak_bytes"].values())
    assert [hop["relay_bytes"] - hidden for hop in interleaved["hops"]] == [kv, kv, kv]
    assert [hop["padded_bytes"] - hidden for hop in interleaved["hops"]] == [kv, kv, kv]
    # They wait on rank 1 for their readers in the last stage; the gradients of one microbatch may wait there as well.
    assert [rank["resident_bytes"] for rank in plain["ranks"]] == [0, 0]
    assert interleaved["ranks"][0]["resident_bytes"] == 0 < interleaved["ranks"][1]["resident_bytes"]


def test_plan_steps(tmp_path: Path) -> None:
    """Over a line of a known rate the doctor's rate is that; every step and round is in the figures."""
    flags = ["--cases", "pp2-slow", "--layers", "4", "--hidden", "128", "--heads", "4", "--seq-length", "256"]
    flags += ["--microbatches", "2", "--rounds", "1", "--steps", "2", "--megabits", "80"]
    result, printed = run_benchmark("plan_steps", tmp_path / "plan.json", *flags)
    if "not_measured" in result["rows"][0]:
        assert "not allowed here: " in printed
        pytest.skip(result["rows"][0]["not_measured"])
    assert [(row["model"], row["link"], row["seconds"]["n"]) for row in result["rows"]] == [
        ("sla", "80 Mbit/s", 2),
        ("dense", "80 Mbit/s", 2),
    ]
    for row in result["rows"]:
        (flags,) = row["plan_flags"]
        assert f"--link-gb-per-s {row['rates']['link-gb-per-s']['median']:.4g} " in flags
        # Headers, a burst, and what else runs; without the line it is a hundredfold.
        assert 0.5 * 0.01 < row["rates"]["link-gb-per-s"]["median"] < 1.5 * 0.01
        assert row["predicted_over_measured"]["median"] == pytest.approx(
            row["predicted_seconds"]["median"] / row["seconds"]["median"]
        )
    assert "predicted and real" in printed


@pytest.mark.parametrize("compiled", [False, True])
def test_generation(compiled: bool, tmp_path: Path) -> None:
    """The cache is the formula's, 13 of 16 groups, also where its size is fixed; every round is in the figures.

    Each length of a prompt is compiled anew, which takes as long: one is.
    """
    if compiled and shutil.which("g++") is None:
        pytest.skip("torch compiles for a processor with g++")
    prompts = (24,) if compiled else (24, 8)
    flags = ["--model", "tiny", "--prompts", *map(str, prompts), "--batches", "2", "--tokens", "5", "--rounds", "3"]
    flags += ["--compile", "--warmup", "1"] if compiled else []
    result = run("generation", tmp_path, *flags, "--device", "cpu")
    assert [(row["prompt"], row["batch"], row["new_tokens"]) for row in result["rows"]] == [(n, 2, 5) for n in prompts]
    for row in result["rows"]:
        assert row["compiled"] == compiled
        # Keys and values, 2 prompts, their tokens and all new ones but the last, heads of 16, fp32.
        group = 2 * 2 * (row["prompt"] + 4) * 16 * 4
        for variant, groups in (("dense", 16), ("full", 13), ("pruned", 13), ("peer", 16)):
            figures = row["variants"][variant]
            assert figures["cache_bytes"] == figures["formula_bytes"] == groups * group
            assert figures["decode_tokens_per_second"]["n"] == figures["prefill_seconds"]["n"] == 3
        for variant in ("full", "pruned"):
            assert row["cache_ratio"][variant] == 13 / 16
            assert row["decode_ratio"][variant]["n"] == row["prefill_ratio"][variant]["n"] == 3
        assert row["peer"] == "GPT2LMHeadModel"
        assert {figures["n"] for figures in row["decode_over_peer"].values()} == {3}


def test_convert(tmp_path: Path) -> None:
    """One direction, the one that takes less time, against a copy of what it reads, at two sizes."""
    flags = ("--models", "tiny", "narrow", "--rounds", "1", "--warmup", "0", "--folder", str(tmp_path))
    rows = run("convert", tmp_path, *flags, "--directions", "megatron-to-hf")["rows"]
    assert [row["direction"] for row in rows] == ["megatron-to-hf"]
    # Layers of 12 h^2 + 13 h, embeddings of 512 tokens (500 and padding) and of the positions, the last norm.
    parameters = [layers * (12 * h**2 + 13 * h) + (512 + at) * h + 2 * h for layers, h, at in SIZES]
    for row in rows:
        assert [size["parameters"] for size in row["sizes"]] == parameters
        for size in row["sizes"]:
            assert size["source_bytes"] >= 4 * (size["parameters"] - 12 * 96)
            assert size["result_bytes"] >= 4 * (size["parameters"] - 12 * 96)
            # Of one run each: all that is not imported is fixed, or grows with the bytes.
            work = row["fixed_seconds"] + row["seconds_per_gb"]["convert"] * size["source_bytes"] / 1e9
            assert size["work_seconds"]["convert"]["median"] == pytest.approx(work)
            seconds = size["cpu_seconds"]["convert"]["median"]
            assert seconds - work == pytest.approx(row["import_seconds"]["median"], abs=seconds / 2)
        ratio = row["seconds_per_gb"]["convert"] / row["seconds_per_gb"]["copy"]
        assert row["slope_over_copy"] == pytest.approx(ratio)
    assert not list(tmp_path.glob("sla-convert-*"))


def test_startup_counts_processes_whose_parents_are_gone() -> None:
    """As the server of sla-data's workers, which its command does not wait for."""
    orphan = """
import os, time
if os.fork():
    os._exit(0)
print("word", flush=True)
while time.process_time() < 0.5:
    pass
"""
    code = f"""
import sys
from benchmarks.tokenize_startup import adopt_orphans, one_run
adopt_orphans()
print(one_run([sys.executable, "-c", {orphan!r}])["cpu_seconds"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert 0.5 <= float(done.stdout) < 5, done.stderr


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("throughput", ["--layouts", "1x2"], "--layouts 1x2: expected virtual stages on 2 ranks or more"),
        ("throughput", ["--rounds", "0"], "--rounds 0: expected an integer of 1 or more"),
        ("transport", ["--layers", "6", "--ranks", "4"], "--layers 6: expected a multiple of --ranks 4"),
        ("generation", ["--rounds", "none"], "--rounds none: expected an integer of 1 or more"),
        ("generation", ["--seconds", "0"], "--seconds 0: expected an integer of 1 or more"),
        ("generation", ["--compile", "--warmup", "0"], "--warmup 0: expected 1 or more with --compile"),
        ("tokenize_startup", ["--rounds", "0"], "--rounds 0: expected an integer of 1 or more"),
        ("convert", ["--folder", "no/such"], "--folder no/such: expected a folder that is there"),
        ("convert", ["--package", "tests"], "--package tests: expected a folder with sla_megatron in it"),
    ],
)
def test_bad_flags(name: str, flags: list[str], message: str, tmp_path: Path) -> None:
    """One line names flag, value and what is accepted; nothing is written."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(tmp_path / "x.json"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(message)
    assert not list(tmp_path.iterdir())
