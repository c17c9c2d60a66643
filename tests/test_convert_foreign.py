"""Dense GPT-2, Llama and Megatron models become checkpoints to go on from with ``--sla``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.convert_models import LAYERS, save_random_checkpoint
from tests.support.foreign_models import save_foreign

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]


FOREIGN: dict[str, dict[str, Any]] = {
    "gpt2": {"kind": "GPT2"},
    "llama": {},
    "llama-tied-wide-heads": {"tie_word_embeddings": True, "head_dim": 12},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"kind": "Mistral", "sliding_window": None},
    "qwen2": {"kind": "Qwen2"},
    "qwen3": {"kind": "Qwen3", "head_dim": 12},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_dense_hugging_face_model(tmp_path: Path, name: str) -> None:
    """Megatron's logits are the original's; as a skip-layer model whose distance is beyond the last layer, too."""
    from sla_megatron.commands.convert.commands import WithSLA, hf_to_megatron, megatron_to_hf, open_megatron
    from sla_megatron.commands.convert.hf_reader import HFSource
    from sla_megatron.commands.convert.verify import THRESHOLD, compare

    save_foreign(tmp_path / "hf", **FOREIGN[name])
    hf_to_megatron(HFSource(tmp_path / "hf"), tmp_path / "dense")
    dense = open_megatron(tmp_path / "dense")
    assert compare(dense, tmp_path / "hf").relative <= THRESHOLD

    hf_to_megatron(WithSLA(dense, distances=[LAYERS]), tmp_path / "beyond")
    beyond = open_megatron(tmp_path / "beyond")
    assert beyond.args.sla
    assert compare(beyond, tmp_path / "hf").relative <= THRESHOLD

    # With a distance that skips it is another function; our export of it agrees with Megatron.
    hf_to_megatron(WithSLA(dense, distances=[1]), tmp_path / "skipping")
    skipping = open_megatron(tmp_path / "skipping")
    assert compare(skipping, tmp_path / "hf").relative > 100 * THRESHOLD
    megatron_to_hf(skipping, tmp_path / "exported")
    assert compare(skipping, tmp_path / "exported").relative <= THRESHOLD


@pytest.mark.parametrize("projection", ["full", "pruned"])
def test_dense_to_sla_keeps_the_weights(tmp_path: Path, projection: str) -> None:
    """The same weights, but for rows of keys and values that nobody reads; the settings are those asked for."""
    from sla_megatron.commands.convert.commands import WithSLA, hf_to_megatron, open_megatron
    from sla_megatron.commands.convert.mapping import entries

    save_random_checkpoint(tmp_path / "dense", {"position_embedding_type": "rope"})
    dense = open_megatron(tmp_path / "dense")
    source = WithSLA(dense, [2], 2, "3-4", projection)
    hf_to_megatron(source, tmp_path / "sla")
    found = open_megatron(tmp_path / "sla")
    settings = (found.args.sla, found.args.sla_skip_distance, found.args.sla_num_skip_groups, found.args.sla_layers)
    assert settings == (True, [2], 2, "3-4")
    assert found.args.sla_kv_projection == projection
    smaller = []
    for entry in entries(found.config):
        tensor, original = found.get(entry.hf), dense.get(entry.hf)
        if tensor.shape != original.shape:
            smaller.append(entry.hf)
            # Groups 1 and 3 skip (NSNS); of layers 3 and 4 groups 0 and 2 are left, 8 rows each.
            original = torch.cat([original[0:8], original[16:24]])
        assert torch.equal(tensor, original), entry.hf
    kinds = [
        f"model.layers.{layer}.self_attn.{which}_proj.{what}"
        for layer in (2, 3)
        for which in "kv"
        for what in ("weight", "bias")
    ]
    assert sorted(smaller) == (sorted(kinds) if projection == "pruned" else [])
