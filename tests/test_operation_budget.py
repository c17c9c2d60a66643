"""How many operations a layer that reads an earlier one may start, and how much it may write, beyond a dense layer.

A whole step of Megatron's is counted, dense and skip-layer, as torch dispatches it.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.benchmarks import run_benchmark

pytestmark = pytest.mark.distributed

#: Operations beyond a dense layer, the source's side included.
MOST = {"full": 4, "pruned": 2}
#: A hop of a pipeline packs on one rank and unpacks on the other, forward and backward.
OF_A_HOP = 4
#: Hidden states written beyond a dense layer by ``full``: queries, keys and values mixed once (3), the gradients of
#: three quarters of the keys and values summed once (1.5); with three queries a group, dense copies its queries too.
MOST_WRITTEN = {"tiny": 4.5, "tiny-rope-gqa": 2.0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("operations") / "operations.json"
    flags = ["--models", *MOST_WRITTEN, "--layouts", "1", "tp2", "2x1", "--context", "32", "--no-decoding"]
    result, printed = run_benchmark("operations", out, "--device", "cpu", *flags)
    assert "Operations of a training step" in printed
    return result["rows"]


def test_every_variant_was_counted(rows: list[dict[str, Any]]) -> None:
    """Of two distances of half of four groups on two ranks, each rank has one live group: all can be pruned."""
    assert len(rows) == 2 * 3 * 7
    refused = [(row["model"], row["layout"], row["variant"]) for row in rows if "refused" in row]
    assert all(layout == "tp2" and variant == "pruned, 3 2" for _, layout, variant in refused)


def test_the_budget(rows: list[dict[str, Any]]) -> None:
    over = []
    for row in rows:
        if row["variant"] == "dense" or "refused" in row:
            continue
        projection, is_pipeline = row["variant"].split(",")[0], row["layout"] == "2x1"
        operations = row["operations_beyond"] <= MOST[projection] + OF_A_HOP * is_pipeline
        written = (
            is_pipeline or projection == "pruned" or row["hidden_states_written_beyond"] <= MOST_WRITTEN[row["model"]]
        )
        kept = row["hidden_states_kept_beyond"] <= 0
        if not (operations and written and kept):
            over.append(row)
    assert not over


def test_a_dense_step_is_counted_as_torch_documents_it(rows: list[dict[str, Any]]) -> None:
    """Four layers with four matrix products each and the output layer, once forward and twice backward."""
    (dense,) = [row for row in rows if (row["model"], row["layout"], row["variant"]) == ("tiny", "1", "dense")]
    products = sum(dense["by_name"].get(name, 0) for name in ("mm", "addmm", "bmm", "matmul", "linear"))
    assert products == 3 * (4 * 4 + 1)
    assert dense["by_name"]["native_layer_norm"] == 2 * 4 + 1
