"""A newcomer's way: what is read from the lines of its commands, and when they came."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import newcomer
from benchmarks.newcomer import Line, PathError, moments, said
from tests.support.launch import ROOT

#: As a quickstart printed them, with the seconds of each.
LINES = [
    Line(
        0.9,
        "quickstart: takes about 5 minutes on two idle cores; loading torch, 0 s",
    ),
    Line(3.0, "quickstart: a dense and a skip-layer GPT, 160 iterations each: about 5 minutes on two idle cores"),
    Line(3.1, "reading Python's own sources, up to 8 MB"),
    Line(11.0, "dense: starting 2 ranks; log in runs/quickstart/dense.log"),
    Line(16.0, " dense    5 s: importing torch and Megatron"),
    Line(19.5, " dense      1/160    loss 8.5117   1972 ms/iteration"),
    Line(21.5, " dense      4/160    loss 7.9694   500 ms/iteration"),
    Line(24.0, " dense     50        validation loss 6.0943"),
    Line(31.0, "   sla      1/160    loss 8.5112   1700 ms/iteration"),
    Line(33.0, "export: runs/quickstart/sla/checkpoints to runs/quickstart/sla/hf"),
    Line(40.0, "export: logits equal; relative error 1.08e-07, largest difference 1.91e-06"),
    Line(47.0, "After 327,680 tokens the skip-layer model's validation loss is 4.6100"),
    Line(48.0, ""),
]


def test_moments() -> None:
    """The longest silence is between lines 3.1 and 11.0."""
    expected = {"first_word": 0.9, "first_loss": 19.5, "export": 40.0, "quickstart": 48.0, "longest_silence": 7.9}
    assert moments(LINES) == pytest.approx(expected)
    assert moments([Line(9.0, "late"), *LINES[5:]])["longest_silence"] == 10.5


@pytest.mark.parametrize(("gone", "what"), [(" loss 8", "a loss"), ("logits equal", "an export with equal logits")])
def test_what_never_came_is_named(gone: str, what: str) -> None:
    lines = [line for line in LINES if gone not in line.text and "loss 7" not in line.text]
    with pytest.raises(PathError, match=f"^the quickstart ended without {what}$"):
        moments(lines)


def test_lines_have_their_times(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of both streams, from a process; the last is its end."""
    script = "import sys, time; print('a', flush=True); time.sleep(0.3); print('b', file=sys.stderr); time.sleep(0.2)"
    first, second, end = said([sys.executable, "-u", "-c", script], tmp_path)
    assert (first.text, second.text, end.text) == ("a", "b", "")
    assert 0.25 < second.at - first.at < 5 and 0.15 < end.at - second.at < 5
    assert capfd.readouterr().out.splitlines()[0].endswith(" a")


def test_a_step_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="ended with 3:\nno space left$"):
        said([sys.executable, "-c", "print('no space left'); raise SystemExit(3)"], tmp_path)


def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone, a quickstart's words, the README's plan: one row a step, in a page's table."""
    ways = []

    def short(command: list[str], folder: Path, programs: Path | None = None) -> list[Line]:
        ways.append((command, folder.name))
        if command[0] == "git":
            (folder / "sla-megatron").mkdir()
            (folder / "sla-megatron" / "README.md").write_text((ROOT / "README.md").read_text())
        return LINES if "examples.quickstart.run" in command else [Line(1.0, "words"), Line(2.5, "")]

    monkeypatch.setattr(newcomer, "said", short)
    out = tmp_path / "newcomer-cpu.json"
    words = ["--out", str(out), "--runs", "2", "--quickstart-args", "--train-iters 8", "--note", "tests"]
    monkeypatch.setattr(sys, "argv", ["newcomer", *words])
    newcomer.main()
    result = json.loads(out.read_text())
    assert [command[0] for command, _ in ways] == ["git", sys.executable, "sh"] * 2
    assert ways[1][0][-2:] == ["--train-iters", "8"] and ways[2][0][2].startswith("sla-plan --sla ")
    found = {row["step"]: row["seconds"]["median"] for row in result["rows"]}
    assert found["plan"] == found["clone"] == 2.5 and found["export"] == 40.0 and "environment" not in found
    (table,) = newcomer.tables(result)
    assert ["quickstart: all of it", "48.0 (48.0-48.0)", "2"] in [list(row) for row in table.rows]
    assert "The quickstart had --train-iters 8." in table.note and "Meanwhile: tests." in table.note


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--python", "no/such"], "--python no/such: expected a Python that can be run"),
        (["--runs", "0"], "--runs 0: expected an integer of 1 or more"),
    ],
    ids=["python", "runs"],
)
def test_bad_flags(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["newcomer", "--out", str(tmp_path / "x.json"), *words])
    with pytest.raises(SystemExit, match="2"):
        newcomer.main()
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
    assert list(tmp_path.iterdir()) == []
