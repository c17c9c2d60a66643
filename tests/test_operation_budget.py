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
#: Other shares and sources -> keys and values that are summed, of which there are two halves; each further reader of a
#: source adds its gradient to those before it, in an operation for keys and one for values.
SUMMED = {"values": 0.75, "keys": 0.75, "skipv1": 0.5, "cla2": 2.0, "half-shared": 2.0}
#: Keys, or values, beside hidden states: in "tiny-rope-gqa" there is one for three queries.
WIDTH = {"tiny": 1, "tiny-rope-gqa": 1 / 3}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("operations") / "operations.json"
    flags = ["--models", *MOST_WRITTEN, "--layouts", "1", "tp2", "2x1", "--context", "32", "--no-decoding"]
    flags += ["--methods", "1"]
    result, printed = run_benchmark("operations", out, "--device", "cpu", *flags)
    assert "Operations of a training step" in printed
    return result["rows"]


def test_every_variant_was_counted(rows: list[dict[str, Any]]) -> None:
    """Of two distances of half of four groups on two ranks, each rank has one live group: all can be pruned."""
    assert len(rows) == 2 * (3 * 7 + 2 * len(SUMMED))
    refused = [(row["model"], row["layout"], row["variant"]) for row in rows if "refused" in row]
    assert all(layout == "tp2" and variant == "pruned, 3 2" for _, layout, variant in refused)


def method_of(row: dict[str, Any]) -> str:
    return row["variant"].partition(", ")[2]


def test_the_budget(rows: list[dict[str, Any]]) -> None:
    over = []
    for row in rows:
        if row["variant"] == "dense" or "refused" in row or method_of(row) in SUMMED:
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


def test_other_shares_and_sources_have_the_same_budget(rows: list[dict[str, Any]]) -> None:
    """Where keys or values alone are mixed, too: no more operations, and less is written where less is summed."""
    found = [row for row in rows if method_of(row) in SUMMED]
    assert {row["layout"] for row in found} == {"1"} and not any("refused" in row for row in found)
    over = []
    for row in found:
        projection, method = row["variant"].split(", ")
        width = WIDTH[row["model"]]
        # Keys and values, and queries where dense does not copy them.
        most_written = (3 if width == 1 else 2 * width) + SUMMED[method] * width
        written = projection == "pruned" or row["hidden_states_written_beyond"] <= most_written + 0.01
        if not (row["operations_beyond"] <= MOST[projection] and written and row["hidden_states_kept_beyond"] <= 0):
            over.append(row)
    assert not over


def test_a_dense_step_is_counted_as_torch_documents_it(rows: list[dict[str, Any]]) -> None:
    """Four layers with four matrix products each and the output layer, once forward and twice backward."""
    (dense,) = [row for row in rows if (row["model"], row["layout"], row["variant"]) == ("tiny", "1", "dense")]
    products = sum(dense["by_name"].get(name, 0) for name in ("mm", "addmm", "bmm", "matmul", "linear"))
    assert products == 3 * (4 * 4 + 1)
    assert dense["by_name"]["native_layer_norm"] == 2 * 4 + 1
