"""Loss by position: a model whose losses are known, windows of held-out text, bins, and the check against training."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from benchmarks import position_losses, position_tables, positions

VOCABULARY = 7


class Known:
    """Gives the right token, which is the one before plus 1, odds of ``position`` to 1 against each of the others."""

    def __call__(self, tokens: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        right = (tokens + 1) % VOCABULARY
        place = torch.arange(1, tokens.shape[1] + 1, dtype=torch.float32).expand_as(tokens)
        logits = torch.zeros(*tokens.shape, VOCABULARY).scatter(2, right[..., None], place.log()[..., None])
        return SimpleNamespace(logits=logits)


def test_losses_of_a_model_that_is_known() -> None:
    """At position p the loss is log(p + 6) - log(p) where the text counts up, and log(p + 6) elsewhere."""
    counting = torch.arange(6) % VOCABULARY
    windows = torch.stack([counting, counting + 1, torch.zeros(6, dtype=torch.int64)])
    found = position_losses.losses_by_position(Known(), windows, batch=2)
    up = [math.log(p + 6) - math.log(p) for p in range(1, 6)]
    assert found.shape == (3, 5)
    assert found[0].tolist() == pytest.approx(up) and found[1].tolist() == pytest.approx(up)
    assert found[2].tolist() == pytest.approx([math.log(p + 6) for p in range(1, 6)])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty documents of three tokens: 100 * i and the next two."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path_factory.mktemp("data") / "corpus")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for i in range(20):
        builder.add_document(torch.tensor([100 * i, 100 * i + 1, 100 * i + 2]), [3])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_windows_are_the_held_out_documents(corpus: str) -> None:
    """Joined, each token but the first predicted once; the split is Megatron's: 5 of 20 documents from the 15th."""
    found = position_losses.held_out_windows(corpus, "75,25,0", 4)
    tokens = [100 * i + j for i in range(15, 20) for j in range(3)]
    assert found.tolist() == [tokens[0:5], tokens[4:9], tokens[8:13]]
    with pytest.raises(positions.StartError, match="15 held-out tokens: expected more than the context of 15"):
        position_losses.held_out_windows(corpus, "75,25,0", 15)


@pytest.mark.parametrize(
    ("context", "bins"),
    [
        (8, [(1, 8)]),
        (64, [(1, 16), (17, 64)]),
        (200, [(1, 16), (17, 64), (65, 128), (129, 200)]),
        (1024, [(1, 16), (17, 64), (65, 128), (129, 256), (257, 512), (513, 1024)]),
    ],
    ids=str,
)
def test_bins(context: int, bins: list[tuple[int, int]]) -> None:
    assert positions.bins_of(context) == bins


def run(seed: int = 1, distances: tuple[int, ...] = (), loss: float = 2.0) -> dict[str, Any]:
    """A row of a sweep."""
    return {
        **{"name": f"code-s{seed}", "size": "code", "context": 32, "seed": seed, "tokens": 320},
        **{"distances": list(distances), "skip_groups": 6 if distances else 0, "kv_projection": "full", "layers": None},
        **{"num_layers": 8, "num_heads": 8, "num_groups": 8, "validation_loss": loss},
    }


def test_a_row_has_the_mean_of_each_bin() -> None:
    row = positions.row_of(run(), [3.0] * 16 + [1.0] * 16, windows=4, again=2.0)
    assert row["bins"] == [[1, 16, 3.0], [17, 32, 1.0]] and row["loss"] == 2.0 and row["windows"] == 4


@pytest.mark.parametrize("again", [2.0 + 2e-4, 2.0 - 2e-4, math.nan], ids=["above", "below", "no number"])
def test_another_loss_than_training_printed(again: float) -> None:
    """Rounding is far below 1e-4."""
    positions.check(positions.row_of(run(), [2.0] * 32, 1, 2.0 + 5e-5))
    with pytest.raises(
        positions.StartError, match=r"code-s1: training printed 2.000000, and on the same samples it is"
    ):
        positions.check(positions.row_of(run(), [2.0] * 32, 1, again))


def test_samples_of_an_evaluation(corpus: str) -> None:
    """Windows of the held-out documents in some order; no two evaluations of an epoch have one in common."""
    first, second = (position_losses.drawn_windows(corpus, "75,25,0", 2, 1, 3, before) for before in (0, 1))
    assert first.shape == second.shape == (3, 3)
    assert all(1500 <= token < 2000 for token in [*first.flatten().tolist(), *second.flatten().tolist()])
    assert not {tuple(one) for one in first.tolist()} & {tuple(one) for one in second.tolist()}
    other = position_losses.drawn_windows(corpus, "75,25,0", 2, 2, 3, 0)
    assert other.tolist() != first.tolist()
    # Megatron would leave its index there.
    assert {path.name for path in Path(corpus).parent.iterdir()} == {"corpus.bin", "corpus.idx"}


def rows() -> list[dict[str, Any]]:
    """Two seeds; SLA is 0.1 and 0.3 below dense late, and the same early."""
    made = []
    for seed, late in ((1, 0.1), (2, 0.3)):
        made.append(positions.row_of(run(seed), [3.0] * 16 + [1.0] * 16, 1, 2.0))
        made.append(positions.row_of(run(seed, (6,)), [3.0] * 16 + [1.0 - late] * 16, 1, 2.0))
    # Without a dense run it is compared with nothing.
    return [*made, positions.row_of(run(9, (6,)), [1.0] * 32, 1, 2.0)]


def test_differences_are_of_one_seed() -> None:
    """Mean -0.2, s = 0.1 sqrt(2), over sqrt(2): 0.1, times 12.7062."""
    (table,) = position_tables.tables({"rows": rows()})
    assert [cells[4:9] for cells in table.rows] == [
        ("1-16", "2", "3.0000", "3.0000", "+0.0000 (+0.0000 to +0.0000)"),
        ("17-32", "2", "0.8000", "1.0000", "-0.2000 (-1.4706 to +1.0706)"),
    ]
    assert all(len(cells) == len(table.header) for cells in table.rows)


def test_the_picture(tmp_path: Path) -> None:
    position_tables.plot({"rows": rows()}, tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()[:2000]


def test_a_folder_without_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text('{"sla-sweep": 1}')
    monkeypatch.setattr(sys, "argv", ["positions", str(tmp_path), "--out", str(tmp_path / "positions-x.json")])
    with pytest.raises(SystemExit, match="2"):
        positions.main()
    assert "no finished run has a checkpoint: expected a grid with --save-interval" in capsys.readouterr().err


def test_a_flag_counts_where_it_comes_last() -> None:
    assert positions.flag({"flags": ["--split", "1,1,0", "--split", "95,5,0"]}, "--split") == "95,5,0"
    with pytest.raises(positions.StartError, match="code-s1 has no --split"):
        positions.flag(run() | {"flags": []}, "--split")
