"""Dense GPT-2, Llama and Megatron models become checkpoints to go on from with ``--sla``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.convert_models import LAYERS, save_random_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]


def _gpt2(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=100, n_positions=24, n_embd=32, n_layer=LAYERS, n_head=4, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(folder)


def _llama(folder: Path, kind: str = "Llama", **changes: Any) -> None:
    import transformers

    settings = dict(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        initializer_range=0.3,
    )
    config = getattr(transformers, f"{kind}Config")(**settings | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases too: at 1 and 0 they would hide mistakes.
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)


FOREIGN = {
    "gpt2": (_gpt2, {}),
    "llama": (_llama, {}),
    "llama-tied-wide-heads": (_llama, {"tie_word_embeddings": True, "head_dim": 12}),
    "llama-biases": (_llama, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (_llama, {"kind": "Mistral", "sliding_window": None}),
    "qwen2": (_llama, {"kind": "Qwen2"}),
    "qwen3": (_llama, {"kind": "Qwen3", "head_dim": 12}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_dense_hugging_face_model(tmp_path: Path, name: str) -> None:
    """Megatron's logits are the original's; as a skip-layer model whose distance is beyond the last layer, too."""
    from sla_megatron.commands.convert.commands import WithSLA, hf_to_megatron, megatron_to_hf, open_megatron
    from sla_megatron.commands.convert.hf_reader import HFSource
    from sla_megatron.commands.convert.verify import THRESHOLD, compare

    torch.manual_seed(4)
    make, changes = FOREIGN[name]
    make(tmp_path / "hf", **changes)
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
