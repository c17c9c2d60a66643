"""What sla-data says while something takes long: on a terminal a line that is drawn anew, in a log a line a second."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest

from sla_megatron.commands.data import progress, shards
from sla_megatron.commands.data.inputs import Inputs
from sla_megatron.commands.data.shards import Advance, ShardRecord
from sla_megatron.commands.data.sources import TextFile
from sla_megatron.commands.data.tokenizing import Job, _prepare
from sla_megatron.commands.data.workers import ThisProcess
from sla_megatron.common import waiting
from sla_megatron.common.tokenizers import DEFAULTS
from tests.support.tokenizers import train_sentencepiece


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second takes 20 ms."""
    monkeypatch.setattr(waiting, "_FIRST_MINUTE_SECONDS", 0.02)
    monkeypatch.setattr(waiting, "_TERMINAL_SECONDS", 0.02)


def lines_until(stream: io.StringIO, count: int) -> None:
    """Returns when so many lines are there."""
    deadline = time.monotonic() + 20
    while len(stream.getvalue().replace("\r", "\n").split("\n")) <= count:
        assert time.monotonic() < deadline, "nothing more is said"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [io.StringIO, Screen])
def test_something_is_said_although_nothing_moves(
    stream: type[io.StringIO], often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    with waiting.bar("reading", 100.0):
        assert "reading:   0%" in err.getvalue()  # At once.
        lines_until(err, 4)
    with progress.waiting_for("waiting"):
        assert "sla-data: waiting, 0 s" in err.getvalue()
        lines_until(err, 10)
    if stream is Screen:
        assert err.getvalue().count("\n") == 1 and err.getvalue().endswith("\r"), "the wait's line is to go away"
    else:
        assert "\r" not in err.getvalue() and all(err.getvalue().splitlines())


def test_a_log_has_fewer_lines_after_a_minute(often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_MINUTE", -1.0)
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    with waiting.bar("reading", 100.0):
        time.sleep(0.3)
    assert err.getvalue().count("\n") == 2, "the first, and at the end"


def test_what_is_quick_is_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    with pytest.raises(KeyError), progress.waiting_for("opening", quick=True):
        raise KeyError
    assert err.getvalue() == ""
    with progress.waiting_for("opening", quick=True):
        lines_until(err, 1)
    assert err.getvalue().startswith("sla-data: opening, 0 s\n")


class Heard:
    def __init__(self) -> None:
        self.advances: list[tuple[Advance, float]] = []

    def advance(self, advance: Advance, work: float) -> None:
        self.advances.append((advance, work))

    def staff(self, *numbers: int) -> None:
        raise AssertionError("there is one process")


def test_within_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that takes long is not silent: documents count as they are encoded, and the bar ends where it would."""
    monkeypatch.setattr(shards, "_ADVANCE_SECONDS", 0.0)
    model = train_sentencepiece(tmp_path / "t.model", eos_id=2, pad_id=3)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": "word " * 9}) + "\n" for _ in range(6)))
    settings = {**DEFAULTS, "tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(model)}
    inputs = Inputs([TextFile(tmp_path / "c.jsonl", "jsonl")], "text", 150, 10**6)
    job = Job(inputs, tmp_path / "out", settings)
    job.workdir.shards.mkdir(parents=True)
    heard, team = Heard(), ThisProcess(_prepare, (job,))
    assert team.vocab_size() > 0
    records: list[ShardRecord] = list(team.results(inputs.blocks(), heard))
    for record in records:
        mine = [(advance, work) for advance, work in heard.advances if advance.number == record.number]
        assert [advance.documents for advance, _ in mine] == list(range(1, record.documents + 1))
        assert mine[-1][0].tokens == record.tokens and {work for _, work in mine} == {record.work}
        shares = [advance.share for advance, _ in mine]
        assert shares == sorted(shares) and 0 < shares[0] and 0.7 < shares[-1] <= 1
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    with waiting.bar("tokenizing", inputs.work) as drawn:
        shown = progress.Progress(drawn, [])
        for advance, work in heard.advances:
            shown.advance(advance, work)
        before = drawn.n
        for record in records:
            shown.add(record)
        shown.staff(1, 3, 16)
    assert len(records) == 2 and 0 < before < drawn.n == inputs.work
    assert "6 documents" in err.getvalue() and err.getvalue().endswith("3 of 16 workers, 2 starting]\n")
