"""What a sweep makes of its runs: logs, statistics, tables, plots."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sla_megatron.commands.sweep.plot import NAMES, plot
from sla_megatron.commands.sweep.report import as_markdown, as_text
from sla_megatron.commands.sweep.summary import Spread, groups
from sla_megatron.commands.sweep.training_log import read_log

from .sweep_samples import END, HEAD, ROWS, TRUE, VARIANTS, launch, progress_line, row


def test_a_log() -> None:
    log = read_log([*HEAD, *launch(1, 10), *END])
    assert (log.parameters, log.processes, log.on_cpu, log.validation) == (1234, 2, False, {10: 2.5})
    assert {step.last: step.loss for step in log.steps} == pytest.approx(TRUE)
    assert log.training_loss(1) == pytest.approx(sum(TRUE.values()) / 10)
    assert log.seconds_per_iteration() == pytest.approx(0.1)
    assert log.seconds() == pytest.approx(1.1 + 9 * 0.1)
    assert log.missing(10) is None


def test_validation_within_a_run() -> None:
    """Of ``--eval-interval``; at its last iteration the evaluation that ends a run counts, and the test set never."""
    within = "validation loss at iteration 5 | lm loss value: 3.0E+00 | lm loss PPL: 2.0E+01 | "
    log = read_log([*HEAD, *launch(1, 5), within, *launch(6, 10), *END])
    assert list(log.validation_losses().items()) == [(5, 3.0), (10, 2.5)]
    # One alone is not the end.
    assert read_log([*HEAD, *launch(1, 10), END[0]]).missing(10) == "it has no validation loss at the end"


def test_a_log_of_two_launches_is_that_of_one() -> None:
    """Killed at 7, gone on from the checkpoint of 4; and begun anew."""
    whole = read_log([*HEAD, *launch(1, 10), *END])
    continued = read_log([*HEAD, *launch(1, 7), *HEAD, *launch(5, 10), *END])
    assert continued.training_loss(1) == pytest.approx(whole.training_loss(1))
    assert [step.last for step in continued.steps] == list(range(1, 11))
    assert continued.seconds() == pytest.approx(1.1 + 0.3 + 1.1 + 0.5)
    anew = read_log([*HEAD, *launch(1, 7), *HEAD, *launch(1, 10), *END])
    assert anew.steps == whole.steps


def test_lines_of_several_iterations() -> None:
    """The first line is iteration 1 alone, then the means of 1-4, 5-8, 9-10: weights are iterations."""
    means = [(1, TRUE[1]), (4, sum(TRUE[i] for i in range(1, 5)) / 4), (8, sum(TRUE[i] for i in range(5, 9)) / 4)]
    log = read_log([*HEAD, *(progress_line(i, loss, 100) for i, loss in means)])
    assert [(step.first, step.last) for step in log.steps] == [(1, 1), (2, 4), (5, 8)]
    assert log.steps[1].loss == pytest.approx((TRUE[2] + TRUE[3] + TRUE[4]) / 3, abs=1e-5)
    # Ten lines of 4 are more than there is: all 8 iterations.
    assert log.training_loss(4) == pytest.approx(sum(TRUE[i] for i in range(1, 9)) / 8, abs=1e-5)
    # No line is of iteration 10, and the evaluation after it is the end.
    assert log.missing(10) == "it ends at iteration 8 of 10"
    lines = [*HEAD, *(progress_line(i, loss, 100) for i, loss in means), *END]
    assert read_log(lines).missing(10) is None


@pytest.mark.parametrize(
    ("lines", "missing"),
    [
        ([], "it says no number of parameters"),
        ([*HEAD, *launch(1, 9)], "it ends at iteration 9 of 10"),
        ([*HEAD, *launch(1, 10), END[0], END[2]], "it has no validation loss at the end"),
        ([*HEAD, *launch(1, 10), END[1].replace("2.500000E+00", "nan")], "its loss is not a number"),
    ],
)
def test_a_log_that_is_not_a_finished_runs(lines: list[str], missing: str) -> None:
    assert read_log(lines).missing(10) == missing


def test_statistics_by_hand() -> None:
    found = groups(ROWS)
    assert [(g.distance, g.setting.skip_groups, g.variant, g.seeds) for g in found] == [
        ("", 0, "", (1, 2, 3)),
        ("2", 2, "", (1,)),
        ("2+6", 4, "", (1,)),
        ("6", 2, "", (1, 2, 4)),
        ("6", 2, "layers 7-8, pruned", (1,)),
    ]
    dense, _, several, six, pruned = found
    # (3.0, 3.2, 3.7): mean 3.3, squared deviations 0.09 + 0.01 + 0.16 = 0.26, over n - 1 = 2.
    assert dense.validation_loss == Spread(3, pytest.approx(3.3), 3.0, 3.7, pytest.approx(0.13**0.5))
    assert dense.difference is None and dense.is_dense and dense.tokens_per_second == 200
    # Of seeds 1 and 2 alone: -0.1 and +0.2; of independent means it would be 5.1 - 3.3.
    assert six.differences == {1: pytest.approx(-0.1), 2: pytest.approx(0.2)} and dense.differences == {}
    assert six.difference.n == 2 and six.difference.mean == pytest.approx(0.05)
    assert six.difference.deviation == pytest.approx(0.045**0.5)
    assert (six.skip_heads, several.skip_heads) == (4, 8)
    assert pruned.difference.mean == pytest.approx(-0.05) and pruned.difference.deviation is None


def test_pairs_are_of_the_same_size_and_context() -> None:
    others = [row([], 0, 1, 3.0, size="large"), row([], 0, 1, 3.0, context=32)]
    assert next(g for g in groups([*others, row([6], 2, 1, 2.0)]) if not g.is_dense).difference is None


def test_variants_are_settings_of_their_own() -> None:
    """The same distance and groups, or the same source, and each has its own difference; names come from any row."""
    found = [group for group in groups([*ROWS[:3], *VARIANTS]) if not group.is_dense]
    assert [(g.distance, g.variant, g.seeds, g.difference.mean) for g in found] == [
        ("6", "", (1,), pytest.approx(-0.1)),
        ("6", "values alone", (1,), pytest.approx(-0.2)),
        ("6", "keys alone", (1,), pytest.approx(0.2)),
        ("layer 1", "First's, values alone", (1, 2), pytest.approx(-0.25)),
        ("layer 1", "First's, values alone, pruned, MLP 270", (1,), pytest.approx(-0.4)),
        ("layer 1+4", "", (1,), pytest.approx(0.0)),
    ]
    assert [(g.parameters, g.dense_parameters) for g in found[3:5]] == [(1234, 1234), (1230, 1234)]
    printed = found[4].as_json()
    assert printed["sources"] == (1,) and printed["distances"] == () and printed["ffn_hidden_size"] == 270
    assert (printed["share"], printed["label"], printed["difference"]["n"]) == ("values", "First's", 1)


def test_tables() -> None:
    text = as_text(groups(ROWS)).splitlines()
    assert re.split(r" {2,}", text[4].strip()) == [
        *("small", "16", "6", "4/8", "3", "5.1000 ± 3.3867 (2.9000-9.0000)", "+0.0500 ± 0.2121"),
        *("51.000", "6.1000", "200", "1,234"),
    ]
    # 4 of 1234 are missing.
    assert re.split(r" {2,}", as_text(groups([*ROWS[:1], VARIANTS[-2]])).splitlines()[2].strip()) == [
        *("small", "16", "layer 1", "4/8", "First's, values alone, pruned, MLP 270", "1", "2.6000", "-0.4000"),
        *("26.000", "3.6000", "100", "1,230 (-0.32 %)"),
    ]
    markdown = as_markdown(groups(ROWS)).splitlines()
    assert markdown[1] == "| :-- | --: | --: | --: | :-- | --: | --: | --: | --: | --: | --: | --: |"
    assert markdown[3].startswith("| small | 16 | 2 | 4/8 |  | 1 | 2.8000 | -0.2000 |")


def test_plots(tmp_path: Path) -> None:
    """Two panels; the same bytes from the same rows, and others from other rows."""
    more = [*ROWS, row([], 0, 1, 2.0, context=32), row([2], 2, 1, 2.0, context=32)]
    first, again, other = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    for folder, rows in ((first, more), (again, more[::-1]), (other, [*more, row([4], 2, 1, 2.85)])):
        folder.mkdir()
        assert plot(groups(rows), folder) == [folder / name for name in NAMES[:2]]
    for name in NAMES[:2]:
        drawn = (first / name).read_bytes()
        assert drawn == (again / name).read_bytes() != (other / name).read_bytes()
        ElementTree.fromstring(drawn)
    assert sorted(path.name for path in first.iterdir()) == sorted(NAMES[:2])
    assert plot(groups(ROWS[:3]), tmp_path / "none") == []


def test_what_a_picture_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    plot(groups(ROWS), tmp_path)
    by_distance, by_heads = (figure.axes[0] for figure in drawn)
    assert by_distance.get_legend_handles_labels()[1] == [
        *("dense", "4 of 8 heads", "8 of 8 heads, distances 2+6", "4 of 8 heads, layers 7-8, pruned"),
    ]
    dense, line, several, _ = (
        one for one in by_distance.lines if one.get_label() == "dense" or one.get_marker() in "oD"
    )
    assert list(dense.get_ydata()) == pytest.approx([3.3, 3.3])
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2, 6], [2.8, pytest.approx(5.1)])
    assert list(several.get_xdata()) == [4] and several.get_linestyle() == "None"
    assert by_heads.get_legend_handles_labels()[1] == [
        *("dense", "distance 2", "distance 2+6", "distance 6", "distance 6, layers 7-8, pruned")
    ]
    assert by_heads.lines[1].get_xdata().tolist() == [4]


def test_settings_with_a_name_have_a_picture_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    assert plot(groups([*ROWS[:3], *VARIANTS]), tmp_path) == [tmp_path / name for name in NAMES]
    by_distance, by_heads, by_setting = (figure.axes[0] for figure in drawn)
    # What all read from one layer is at no distance.
    assert by_distance.get_legend_handles_labels()[1] == [
        *("dense", "4 of 8 heads", "4 of 8 heads, values alone", "4 of 8 heads, keys alone")
    ]
    assert by_heads.get_legend_handles_labels()[1][-1] == "layer 1+4"
    assert [text.get_text() for text in by_setting.get_yticklabels()] == [
        *("First's, values alone", "First's, values alone, pruned, MLP 270")
    ]
    points = [line for line in by_setting.lines if line.get_marker() == "o"]
    assert [line.get_xdata().tolist() for line in points] == [[pytest.approx(-0.25)], [pytest.approx(-0.4)]]
    # Without a dense run there is no difference to draw.
    assert plot(groups(VARIANTS), tmp_path) == [tmp_path / name for name in NAMES[:2]]
