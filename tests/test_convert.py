"""Conversions over a generated grid of Megatron's options: logits, round trips, foreign models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.convert_models import AXES, VOCABULARY, generated, save_random_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

GRID = generated(24)


def test_the_grid_has_every_value_of_every_axis() -> None:
    """Names are the values."""
    names = " ".join(f"-{name}-" for name in GRID)
    assert [value for values in AXES.values() for value in values if f"-{value}-" not in names] == []


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, flags in GRID.items():
        save_random_checkpoint(folder / name, flags)
    return folder


def _tensors(source: Any) -> dict[str, torch.Tensor]:
    from sla_megatron.commands.convert.mapping import entries

    return {entry.hf: source.get(entry.hf) for entry in entries(source.config) if torch.Size(entry.shape).numel()}


@pytest.mark.parametrize("name", GRID)
def test_there_and_back(checkpoints: Path, tmp_path: Path, name: str) -> None:
    """Logits of both models; megatron -> hf -> megatron -> hf: every tensor bit for bit, padded rows included."""
    from sla_megatron.commands.convert.commands import hf_to_megatron, megatron_to_hf, open_megatron
    from sla_megatron.commands.convert.hf_reader import HFSource
    from sla_megatron.commands.convert.verify import THRESHOLD, compare

    source = open_megatron(checkpoints / name)
    assert source.config["vocab_size"] == VOCABULARY
    megatron_to_hf(source, tmp_path / "hf", max_shard_bytes=20_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert compare(source, tmp_path / "hf").relative <= THRESHOLD

    hf_to_megatron(HFSource(tmp_path / "hf"), tmp_path / "back")
    back = open_megatron(tmp_path / "back")
    assert {k: v for k, v in back.config.items()} == dict(source.config)
    megatron_to_hf(back, tmp_path / "again")
    first, second = _tensors(source), _tensors(HFSource(tmp_path / "again"))
    assert list(first) == list(second)
    assert [tensor for tensor in first if not torch.equal(first[tensor], second[tensor])] == []
    for vocabulary in {"model.embed_tokens.weight", "lm_head.weight"} & set(first):
        assert torch.equal(source.padding(vocabulary), back.padding(vocabulary))
        assert len(back.padding(vocabulary)) == 28
