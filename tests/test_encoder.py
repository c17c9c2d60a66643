"""The encoder example: what it learns, its flags, and the command at a tiny size."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from examples.encoder import data
from examples.encoder.report import plot, tables
from examples.encoder.run import main
from tests.support.launch import ROOT
from tests.support.side_by_side import BAD_FLAGS, check_refusal, check_row, check_table, run_example


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


@pytest.mark.parametrize(("argv", "message"), BAD_FLAGS)
def test_bad_flags(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refusal(main, argv, message, capsys)


@pytest.mark.distributed
def test_the_example(tmp_path: Path) -> None:
    """At a tiny size: both models read the same and begin alike, and the table says what the JSON file does."""
    sizes = ["--layers", "3", "--hidden", "16", "--heads", "2", "--seq-length", "8", "--steps", "6", "--seeds", "2"]
    result, printed = run_example("encoder", tmp_path, sizes)
    assert result["benchmark"] == "encoder" and result["machine"]["device"] == "cpu"
    assert (result["settings"]["distance"], result["settings"]["skip_groups"]) == ([2], 2)
    rows = result["rows"]
    assert [row["seed"] for row in rows] == [1, 2]
    for row in rows:
        check_row(row, 6)
        chance = random.Random(row["seed"])
        assert row["tokens"] == sum(int(data.batch(chance, 16, 8).is_token.sum()) for _ in range(6))
        held_out = data.batch(random.Random("held out"), 1024, 8)
        assert row["held_out_masked_tokens"] == held_out.is_masked.sum()
        assert row["without_attention"] == data.without_attention(held_out)
    assert rows[0]["curve"][0] != rows[1]["curve"][0]
    committed = json.loads((ROOT / "benchmarks" / "results" / "encoder-cpu.json").read_text())
    assert committed["settings"].keys() == result["settings"].keys()
    assert committed["rows"][0].keys() == rows[0].keys()

    (table,) = tables(result)
    assert table.as_text() in printed
    check_table(table, rows)

    pytest.importorskip("matplotlib")
    plot(result, tmp_path / "again.svg")
    assert "</svg>" in (tmp_path / "again.svg").read_text() and (tmp_path / "encoder.svg").exists()
