"""What a decoded token costs: no more operations than transformers' own model, and few more for a layer that skips."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from benchmarks import decoding_operations
from benchmarks.decoding_operations import count_token, decoding_rows
from benchmarks.models import METHODS, SHAPES, VARIANTS, hf_config, sla_config
from sla_megatron.hf import attention_sla_gpt
from sla_megatron.hf.attention_sla_gpt import MOST_COPIED
from sla_megatron.hf.configuration_sla_gpt import SlaGPTConfig
from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM
from sla_megatron.hf.pieces_sla_gpt import LiveRows

#: Operations that a consumer layer may take beyond a dense one, for each token.
BUDGET = 3


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["shape"], row["variant"]): row for row in decoding_rows()}


@pytest.mark.parametrize(("shape", "peer"), [("narrow", "GPT2LMHeadModel"), ("narrow-llama", "LlamaForCausalLM")])
def test_the_dense_export_takes_no_more_operations_than_transformers_own_model(
    rows: dict[tuple[str, str], dict[str, Any]], shape: str, peer: str
) -> None:
    assert rows[shape, "peer"]["peer"] == peer
    assert rows[shape, "dense"]["total"] <= rows[shape, "peer"]["total"]


def test_the_rows_are_exact(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    again = decoding_rows()
    assert again == list(rows.values())
    assert set(rows) == set(itertools.product(decoding_operations.SHAPES, (*VARIANTS, "peer")))
    for row in again:
        assert sum(row["operations"].values()) == row["total"]
        # The prompt's length is in no operation, and in what is written.
    longer = {(row["shape"], row["variant"]): row for row in decoding_rows(prompt=20)}
    assert all(longer[key]["total"] == row["total"] for key, row in rows.items())
    assert all(longer[key]["bytes_written"] > row["bytes_written"] for key, row in rows.items())


@pytest.mark.parametrize("groups", [12, 4])
@pytest.mark.parametrize("shape", ["narrow", "narrow-llama"])
@pytest.mark.parametrize("mode", ["full", "pruned"])
@pytest.mark.parametrize("most_copied", [0, MOST_COPIED])
def test_what_a_consumer_layer_costs(
    most_copied: int, mode: str, shape: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its caches are short enough to be copied, or not."""
    monkeypatch.setattr(attention_sla_gpt, "MOST_COPIED", most_copied)
    skipping = [g for g in range(groups) if g % 4]

    def count(**sla: Any) -> Any:
        config = SlaGPTConfig(**SHAPES[shape] | {"num_key_value_heads": groups, "sla_kv_projection": mode} | sla)
        return count_token(SlaGPTForCausalLM(config).eval(), 16)

    dense, found = count(), count(sla_skip_distances=[9], sla_skip_groups=skipping)
    assert found.total - dense.total <= 3 * BUDGET
    # Weights are gathered with the prompt; heads are where they are needed.
    assert found.operations["index_select"] == 0
    # The check catches weights that are gathered for each token.
    monkeypatch.setattr(LiveRows, "of", lambda self, projections, afresh: _of(self, projections, True))
    wasteful = count(sla_skip_distances=[9], sla_skip_groups=skipping)
    assert wasteful.operations["index_select"] > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("most_copied", [0, MOST_COPIED])
def test_what_a_consumer_layer_of_each_method_costs(
    most_copied: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_sla_gpt, "MOST_COPIED", most_copied)
    configs = (hf_config("narrow", "dense"), hf_config("narrow", "full", method=method))
    dense, found = (count_token(SlaGPTForCausalLM(config).eval(), 16) for config in configs)
    assert found.total - dense.total <= BUDGET * len(sla_config("narrow", method).consumer_layers)
    # A layer that projects neither keys nor values takes less.
    assert (found.total < dense.total) == (method in ("cla2", "half-shared"))


_of = LiveRows.of
