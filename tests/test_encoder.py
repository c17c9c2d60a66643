"""Skip-layer attention in a bidirectional encoder: Megatron's BERT against the reference, and the example."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from examples.encoder import data
from examples.encoder.report import plot, tables
from examples.encoder.run import main
from tests.support.launch import ROOT, rank_environment, run_worker

#: As in test_parity.py.
TOLERANCE = 1e-5

_BASE = {
    "groups": 4,
    "distances": [3],
    "skip_groups": 3,
    "projection": "full",
    "core": "megatron",
    "tp": 1,
    "sequence_parallel": False,
    "recompute": "none",
    "rope": False,
    "rms_norm": False,
    "tied": False,
}
_CHANGES: dict[str, dict[str, Any]] = {
    "megatron": {},
    "sdpa": {"core": "sdpa"},
    "megatron-tp2": {"tp": 2},
    "sdpa-tp2": {"core": "sdpa", "tp": 2},
    "sdpa-tp2sp-tied": {"core": "sdpa", "tp": 2, "sequence_parallel": True, "tied": True},
    "rope-two-distances": {"rope": True, "distances": [2, 1]},
    "gqa-pruned-tp2": {"groups": 2, "skip_groups": 2, "projection": "pruned", "tp": 2},
    "sdpa-gqa-pruned": {"core": "sdpa", "groups": 2, "skip_groups": 1, "projection": "pruned"},
    "recompute": {"recompute": "uniform2", "distances": [1]},
    "distance-beyond": {"distances": [4], "like dense": True},
    "sdpa-distance-beyond-tp2": {"core": "sdpa", "distances": [5], "tp": 2, "like dense": True},
}
CASES = {name: _BASE | changes for name, changes in _CHANGES.items()}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases in one group of two gloo ranks: a Megatron process takes ten seconds to start."""
    return run_worker("encoder_worker", CASES, 2, tmp_path_factory.mktemp("encoder"))[0]


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_gradient(answers: dict[str, dict[str, Any]], name: str) -> None:
    """Every token but padding sees every other, in both directions and in no other sequence."""
    found = dict(answers[name])
    assert found.pop("least before the change") > 0.0
    assert found.pop("least after the change") > 0.0
    assert found.pop("in other sequences") == 0.0
    # Exactly: its weight in the softmax is zero.
    assert found.pop("by padding") == 0.0
    # With a distance that no layer reaches, bit for bit.
    assert found.pop("is dense", None) is (True if "distance-beyond" in name else None)
    assert {"logits", "encoder.layers.3.self_attention.linear_qkv.weight", "lm_head.dense.bias"} <= set(found)
    too_large = {tensor: error for tensor, error in found.items() if not error <= TOLERANCE}
    assert not too_large


def test_sentences() -> None:
    """Each closes the innermost bracket that is open, and all in the end; what is masked is a token of it."""
    made = data.batch(random.Random(3), 200, 32)
    for words, is_token in zip(made.labels.tolist(), made.is_token.tolist(), strict=True):
        length, opened, deepest = sum(is_token), [], 0
        assert is_token == [True] * length + [False] * (32 - length) and 16 <= length
        for word in words[:length]:
            if word < data.CLOSE:
                opened.append(word - data.OPEN)
            else:
                assert opened.pop() == word - data.CLOSE
            deepest = max(deepest, len(opened))
        assert opened == [] and deepest <= data.DEPTH
    assert (made.is_masked <= made.is_token).all() and made.is_masked.any(dim=1).all()
    assert (made.tokens[made.is_masked] == data.MASK).all()
    assert (made.tokens == made.labels)[~made.is_masked].all()
    # About as rare as it should be, in every place of a sentence.
    assert 0.12 < made.is_masked.sum() / made.is_token.sum() < 0.18
    assert made.is_masked[:, :16].any(dim=0).all()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layers", "0"], "--layers 0: expected an integer of 1 or more"),
        (["--steps", "few"], "--steps few: expected an integer of 1 or more"),
        (["--hidden", "60"], "--hidden 60: expected a multiple of 16: 8 heads of even size"),
        (["--skip-groups", "9"], "--skip-groups 9: expected an integer from 0 to 8"),
        (["--distance", "1", "2", "--skip-groups", "1"], "--distance 1 2: expected at most as many as skip groups, 1"),
        (["--device", "tpu"], "--device tpu: expected"),
        (["--out", "result.txt"], "--out result.txt: expected a name that ends in .json"),
        (["--heads"], "--heads without a value: expected one value"),
    ],
)
def test_bad_flags(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, status 2, before anything is trained."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.distributed
def test_the_example(tmp_path: Path) -> None:
    """At a tiny size: both models read the same and begin alike, and the table says what the JSON file does."""
    out = tmp_path / "encoder.json"
    sizes = ["--layers", "3", "--hidden", "16", "--heads", "2", "--seq-length", "8", "--steps", "6", "--seeds", "2"]
    command = [sys.executable, "-m", "examples.encoder.run", "--device", "cpu", *sizes, "--out", str(out)]
    environment = rank_environment(0, 1, 0)
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    # Nothing of Megatron's about what is not installed.
    assert run.stderr == ""
    result = json.loads(out.read_text())
    assert result["benchmark"] == "encoder" and result["machine"]["device"] == "cpu"
    assert (result["settings"]["distance"], result["settings"]["skip_groups"]) == ([2], 2)
    rows = result["rows"]
    assert [row["seed"] for row in rows] == [1, 2]
    for row in rows:
        check_row(row)
    assert rows[0]["curve"][0] != rows[1]["curve"][0]

    (table,) = tables(result)
    assert table.as_text() in run.stdout
    loss, accuracy, rate = table.rows
    ends = [row["curve"][-1] for row in rows]
    for cells, quantity in ((loss, "loss"), (accuracy, "accuracy")):
        differences = [end["sla"][quantity] - end["dense"][quantity] for end in ends]
        assert cells[1].startswith(f"{mean(end['dense'][quantity] for end in ends):.4f} (")
        assert cells[3] == f"{mean(differences):+.4f} ({min(differences):+.4f} to {max(differences):+.4f})"
    assert rate[3].startswith(f"x {mean(row['step_ratio']['median'] for row in rows):.3f} (")
    ahead = sum(end["sla"]["loss"] < end["dense"]["loss"] for end in ends)
    assert f"SLA has the lower loss with {ahead} of 2 seeds" in table.note

    pytest.importorskip("matplotlib")
    plot(result, tmp_path / "again.svg")
    assert "</svg>" in (tmp_path / "again.svg").read_text() and out.with_suffix(".svg").exists()


def check_row(row: dict[str, Any]) -> None:
    """One seed's figures, where they are known."""
    assert row["parameters"]["dense"] == row["parameters"]["sla"] > 0
    chance = random.Random(row["seed"])
    assert row["tokens"] == sum(int(data.batch(chance, 16, 8).is_token.sum()) for _ in range(6))
    held_out = data.batch(random.Random("held out"), 1024, 8)
    assert row["held_out_masked_tokens"] == held_out.is_masked.sum()
    assert row["without_attention"] == data.without_attention(held_out)
    start, *_, end = row["curve"]
    assert (start["step"], end["step"], len(row["curve"])) == (0, 6, 6)
    # Of the same weights SLA makes another function.
    assert start["dense"] != start["sla"] and start["dense"]["loss"] != end["dense"]["loss"]
    for name in ("dense", "sla"):
        assert 0.0 < end[name]["loss"] < 10.0 and 0.0 <= end[name]["accuracy"] <= 1.0
        assert 0.0 < row["seconds"][name]["min"] <= row["seconds"][name]["median"]
        assert row["seconds"][name]["n"] == row["step_ratio"]["n"] == 1
