"""What the quickstart says: how long beforehand, a word every few seconds, at the end a picture and a sentence."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest

from examples.quickstart import flags, launch, options, picture, progress, report, run, workdir
from examples.quickstart.build_dataset import Dataset
from examples.quickstart.training_log import Records, Result, Step, Validation, read

SVG = "{http://www.w3.org/2000/svg}"


def result(loss: float = 5.0, **changes: float) -> Result:
    values = {"iteration": 120, "parameters": 1000, "train_loss": 4.0, "validation_loss": loss}
    return Result(**{**values, "tokens_per_second": 200.0, **changes})


# Beforehand


@pytest.mark.parametrize(
    ("flags_given", "said"),
    [
        # 80 s, and 0.8 s for each of twice as many iterations.
        ([], "about 5 minutes"),
        (["--train-iters", "1"], "about 1 minute"),
        (["--train-iters", "640"], "about 18 minutes"),
        (["--text", "prose"], "about 6 minutes"),
    ],
    ids=["default", "short", "long", "prose"],
)
def test_how_long(flags_given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.os, "cpu_count", lambda: 4)
    args = options.parse_args(["--out", str(tmp_path / "out"), *flags_given])
    assert options.duration(args) == f"{said} on two idle cores, less with a GPU (here: 4 cores)"


def test_the_readme_says_how_long() -> None:
    """The same minutes as the quickstart itself."""
    minutes = re.match(r"about \d+ minutes", options.duration(options.parse_args(["--out", "no/such", "--fresh"])))[0]
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    assert f"takes {minutes} on two cores" in " ".join(readme.split())


def test_what_is_done_takes_no_time(tmp_path: Path) -> None:
    """Dense has ended: half of the iterations are left; with --fresh all are."""
    workdir.write_json(tmp_path / "dense" / "result.json", result().as_dict())
    assert options.duration(options.parse_args(["--out", str(tmp_path)])).startswith("about 3 minutes on")
    assert options.duration(options.parse_args(["--out", str(tmp_path), "--fresh"])).startswith("about 5 minutes on")


def test_the_first_word_is_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """While torch is still being loaded, and again as the first line of what is printed for good."""

    def slow(args: object) -> int:
        time.sleep(1)
        return 2

    def ended(*_: object, **__: object) -> None:
        raise launch.TrainingFailed("enough")

    monkeypatch.setattr(options, "choose_ranks", slow)
    monkeypatch.setattr(run.build_dataset, "build", ended)
    assert run.main(["--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    printed = capfd.readouterr()
    assert re.match(r"quickstart: takes about 5 minutes on two idle cores, .*; loading torch, [01] s\n", printed.err)
    first = "quickstart: a dense and a skip-layer GPT, 120 iterations each: about 5 minutes on two idle cores, "
    assert printed.out.startswith(first) and printed.out.count("\n") == 1


# Meanwhile


def test_training_is_never_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it does follows the log; a run that says enough itself is not interrupted."""
    script = """
import time
time.sleep(0.5)
print("sla-megatron: off; parameters 10", flush=True)
time.sleep(0.5)
for i in range(1, 9):
    time.sleep(0.05)
    print(f" iteration {i}/ 8 | elapsed time per iteration (ms): 50.0 | lm loss: 1.5 |", flush=True)
"""
    monkeypatch.setattr(launch, "command", lambda ranks, argv: [sys.executable, "-c", script])
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.2)
    launch.train("dense", 2, [], tmp_path / "dense.log")
    begun, *lines, ended = capsys.readouterr().out.strip().splitlines()
    assert begun.startswith("dense: starting 2 ranks") and re.fullmatch(r"dense: done in \d s", ended)
    steps = [line for line in lines if "loss 1.5000" in line]
    assert lines[-8:] == steps
    said = [re.fullmatch(r" dense +\d s: (.*)", line)[1] for line in lines[:-8]]
    assert list(dict.fromkeys(said)) == ["importing torch and Megatron", "setting up data and optimizer"]


def test_progress_ends_with_its_block(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error too, at once."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.1)
    with pytest.raises(KeyboardInterrupt), progress.Progress("export", "comparing"):
        raise KeyboardInterrupt
    time.sleep(0.3)
    assert capsys.readouterr().out == ""


# The picture


def records_of(losses: list[float], held_out: list[float], every: int = 10) -> Records:
    steps = [Step(every * (i + 1), 120, loss, 500.0, True) for i, loss in enumerate(losses)]
    return Records(10, steps, [Validation(20 * (i + 1), loss) for i, loss in enumerate(held_out)])


def test_points_are_tokens_and_losses() -> None:
    """What was trained again after an interruption counts once, as it was last; what is no number is left out."""
    again = Records(10, [*records_of([8.0, 7.0, float("nan")], []).steps, Step(20, 120, 6.5, 1.0, True)])
    assert picture.points(again, 2048) == ([(20_480, 8.0), (40_960, 6.5)], [])
    assert picture.points(records_of([8.0, 7.0], [6.0]), 2048)[1] == [(40_960, 6.0)]


def drawn(path: Path, curve: str) -> numpy.ndarray:
    """The points of a curve of the SVG file, in its own coordinates, whose y grows downwards."""
    (group,) = [group for group in ElementTree.parse(path).iter(f"{SVG}g") if group.get("id") == curve]
    line = group.find(f"{SVG}path")
    if line is not None and line.get("clip-path"):
        return numpy.array([pair.split()[1:] for pair in re.findall("[ML] [-.0-9]+ [-.0-9]+", line.get("d"))], float)
    return numpy.array([(mark.get("x"), mark.get("y")) for mark in group.iter(f"{SVG}use")], float)


def test_the_picture_holds_both_runs(tmp_path: Path) -> None:
    """Every loss of both, on one scale, and the same file for the same figures."""
    pytest.importorskip("matplotlib")
    losses = {"dense": [8.0, 7.0, 6.4, 6.0], "sla": [8.5, 7.0, 6.0, 5.5]}
    held_out = {"dense": [7.5, 6.25], "sla": [7.0, 6.0]}
    runs = {model: records_of(losses[model], held_out[model]) for model in workdir.MODELS}
    path = tmp_path / "losses.svg"
    assert picture.draw(runs, flags.TOKENS_PER_ITERATION, path) == f"picture      {path}"
    # One scale for all: what the dense run's curve says of it, 2 nats from its first point to its last.
    dense = drawn(path, "dense-training")
    unit, top = (dense[-1, 1] - dense[0, 1]) / 2.0, dense[0, 1]
    for model in workdir.MODELS:
        training, validation = drawn(path, f"{model}-training"), drawn(path, f"{model}-validation")
        numpy.testing.assert_allclose(8.0 - (training[:, 1] - top) / unit, losses[model], atol=1e-4)
        numpy.testing.assert_allclose(8.0 - (validation[:, 1] - top) / unit, held_out[model], atol=1e-4)
        numpy.testing.assert_allclose(training[:, 0], dense[:, 0])
        # Held-out text is read after every second of these lines.
        numpy.testing.assert_allclose(validation[:, 0], dense[1::2, 0], atol=1e-4)
    again = tmp_path / "again.svg"
    picture.draw(runs, flags.TOKENS_PER_ITERATION, again)
    assert path.read_bytes() == again.read_bytes()


def test_no_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    said = picture.draw({}, 2048, tmp_path / "losses.svg")
    assert said == "no picture: it needs matplotlib (pip install matplotlib)" and list(tmp_path.iterdir()) == []


# The sentence


SEEDS = "the 0.064 by which dense models that differ in their seed alone were apart (docs/results.md)"


@pytest.mark.parametrize(
    ("dense", "sla", "said"),
    [
        (
            4.63,
            4.61,
            f"4.6100, 0.0200 below the dense model's 4.6300: not more than {SEEDS}, so this one seed",
        ),
        (
            4.61,
            4.63,
            f"4.6300, 0.0200 above the dense model's 4.6100: not more than {SEEDS}, so this one seed",
        ),
        (4.6, 4.6, f"4.6000, equal to the dense model's 4.6000: not more than {SEEDS}, so this one seed"),
        (4.63, 4.53, f"4.5300, 0.1000 below the dense model's 4.6300: more than {SEEDS}, but one seed"),
        (4.53, 4.63, f"4.6300, 0.1000 above the dense model's 4.5300: more than {SEEDS}, but one seed"),
    ],
    ids=["below_within", "above_within", "equal", "below", "above"],
)
def test_what_was_learned(dense: float, sla: float, said: str) -> None:
    sentence = report.learned(result(dense), result(sla), 0.064)
    assert sentence.startswith(f"After 245,760 tokens the skip-layer model's validation loss is {said}")
    assert sentence.count(". ") == 0 and sentence.endswith(".")


def test_runs_of_other_lengths_do_not_compare() -> None:
    assert report.learned(result(iteration=240), result(4.0), 0.064) == (
        "The runs ended after 240 and 120 iterations: their losses do not compare."
    )


def test_no_number_teaches_nothing() -> None:
    said = report.learned(result(4.6), result(float("nan")), 0.064)
    assert said == "The validation losses are 4.6 and nan: training went astray."


def test_the_spread_is_that_of_dense_runs(tmp_path: Path) -> None:
    """Within a size and context, the largest; other settings and sizes do not widen it."""
    rows = [("a", 0, 5.0), ("a", 0, 5.1), ("b", 0, 3.0), ("b", 0, 3.04), ("a", 6, 9.0)]
    path = tmp_path / "sweep.json"
    found = [{"size": size, "context": 128, "skip_groups": k, "validation_loss": loss} for size, k, loss in rows]
    path.write_text(json.dumps({"rows": found}))
    assert report.spread_of_seeds(path) == pytest.approx(0.1)
    assert 0.01 < report.spread_of_seeds() < 0.2


def test_table_has_differences_and_no_speed() -> None:
    """Speeds of two runs one after the other compare nothing."""
    lines = report.table(result(5.0), result(4.5, parameters=900, train_loss=4.25)).splitlines()
    assert [line.split() for line in lines] == [
        ["dense", "SLA", "SLA", "-", "dense"],
        ["parameters", "1,000", "900", "-100"],
        ["final", "train", "loss", "4.0000", "4.2500", "+0.2500"],
        ["final", "validation", "loss", "5.0000", "4.5000", "-0.5000"],
    ]


def test_the_report_ends_with_the_sentence(tmp_path: Path) -> None:
    args = options.parse_args(["--out", str(tmp_path)])
    text = report.report(args, result(4.63), result(4.61), "exported", "picture      losses.svg")
    assert text.strip().splitlines()[-1].startswith("After 245,760 tokens the skip-layer model's")
    assert "  picture      losses.svg\n" in text and "tokens/s" not in text


def test_a_quickstart_ends_with_picture_and_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it but training and export: what both logs say is in the picture and in the summary."""
    pytest.importorskip("matplotlib")

    def train(name: str, ranks: int, argv: list[str], log: Path) -> Records:
        losses = {"dense": (8.0, 5.0, 4.75), "sla": (8.0, 4.9, 4.7)}[name]
        line = " iteration {}/ 120 | elapsed time per iteration (ms): 50.0 | lm loss: {} |\n"
        log.write_text(
            "sla-megatron: parameters 10\n"
            + line.format(3, losses[0])
            + line.format(120, losses[1])
            + f" validation loss at iteration 120 on validation set | lm loss value: {losses[2]} | lm loss PPL: 9 |\n"
        )
        return read(log)

    monkeypatch.setattr(launch, "train", train)
    monkeypatch.setattr(run.build_dataset, "build", lambda *_, **__: Dataset(tmp_path / "data", 10, 1000, 512))
    monkeypatch.setattr(run, "export", lambda checkpoints, folder, text: f"As a Hugging Face model: {text}")
    out = tmp_path / "out"
    assert run.main(["--out", str(out), "--device", "cpu"]) == 0
    text = (out / "summary.txt").read_text()
    assert capsys.readouterr().out.endswith(f"\n{text}\n")
    assert "As a Hugging Face model: code\n" in text and f"  picture      {out / workdir.PICTURE}\n" in text
    sentence = text.strip().splitlines()[-1]
    begins = (
        "After 245,760 tokens the skip-layer model's validation loss is 4.7000, 0.0500 below the dense model's 4.7500"
    )
    assert sentence.startswith(begins)
    assert all(len(drawn(out / workdir.PICTURE, f"{model}-training")) == 2 for model in workdir.MODELS)
    workdir.clear(out)
    assert not (out / workdir.PICTURE).exists()
