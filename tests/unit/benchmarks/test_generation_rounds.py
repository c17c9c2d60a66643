"""Rounds of ``benchmarks.generation`` within a time, and the table of a result with a peer."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from benchmarks import generation
from benchmarks.record import Table


@pytest.mark.parametrize(
    ("seconds", "warmup", "rounds", "each", "expected"),
    [
        # All of them, the warm-up not timed.
        (None, 2, 3, 100, [False, False, True, True, True]),
        (500, 2, 3, 100, [False, False, True, True, True]),
        # The last would end at 500.
        (499, 2, 3, 100, [False, False, True, True]),
        # The rest of the warm-up is left out before a timed round is, and one is timed in any case.
        (150, 2, 3, 100, [False, True]),
        (1, 0, 3, 100, [True]),
        (1, 1, 3, 100, [False, True]),
    ],
)
def test_a_row_s_time_is_bounded(
    seconds: int | None,
    warmup: int,
    rounds: int,
    each: int,
    expected: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(generation.time, "perf_counter", lambda: now)
    found = []
    for number, is_timed in generation.rounds(Namespace(seconds=seconds, warmup=warmup, rounds=rounds), now):
        assert number == len(found)
        found.append(is_timed)
        now += each
    assert found == expected


def test_the_table_has_a_column_for_the_peer() -> None:
    def spread(median: float) -> dict[str, Any]:
        return {"n": 2, "median": median, "min": median, "max": median}

    figures = {
        "decode_tokens_per_second": spread(9),
        "prefill_seconds": spread(1),
        "cache_bytes": 8,
        "formula_bytes": 8,
    }
    row = {
        **{"model": "1b", "peer": "LlamaForCausalLM", "prompt": 8, "batch": 1, "new_tokens": 5, "dtype": "fp32"},
        "variants": dict.fromkeys(("dense", "full", "peer"), figures),
        **{"decode_ratio": {"full": spread(1.1)}, "prefill_ratio": {"full": spread(1.2)}},
        **{"decode_over_peer": {"dense": spread(1.3), "full": spread(1.4)}, "prefill_over_peer": {}},
    }
    (table,) = generation.tables({"rows": [row], "machine": {"device": "cpu"}})
    assert isinstance(table, Table)
    columns = {name: [cells[i] for cells in table.rows] for i, name in enumerate(table.header[:7])}
    assert columns["model"] == ["dense", "full", "LlamaForCausalLM"]
    assert columns["/ dense"] == ["1", "1.100 (1.100-1.100)", ""]
    assert columns["/ peer"] == ["1.300 (1.300-1.300)", "1.400 (1.400-1.400)", "1"]
