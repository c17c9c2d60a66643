"""``sla-data`` says where a data set is too small for the shares that Megatron takes by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sla_megatron.commands.data.cli import main
from tests.support.indexed_files import write_indexed

from .indexed_data import train_model

HINT = "too few documents, 40, for Megatron's default --split 969,30,1: test would get none. Train with --split 38,1,1,"


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture, megatron_imported: None) -> Callable[..., str]:
    def run(*argv: str) -> str:
        capsys.readouterr()
        main([str(word) for word in argv])
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(("documents", "hinted"), [(40, True), (2000, False)])
def test_a_hint_where_a_part_would_be_empty(
    printed: Callable[..., str], tmp_path: Path, documents: int, hinted: bool
) -> None:
    """By each of the two commands that make a data set."""
    half = write_indexed(tmp_path / "half", documents // 2)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * documents)
    model = train_model(tmp_path / "tokenizer.model")
    said = [
        printed("merge", "--output-prefix", tmp_path / "whole", half, half),
        printed(
            *("tokenize", "--input", text, "--output-prefix", tmp_path / "tokens"),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model, "--workers", "1"),
        ),
    ]
    assert [HINT in out for out in said] == [hinted] * 2
