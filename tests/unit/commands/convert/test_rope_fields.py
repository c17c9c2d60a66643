"""Rotary embedding in ``config.json``: by both of its names out, by either of them in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from sla_megatron.commands.convert.architecture import argv_from_config
from sla_megatron.commands.convert.errors import ConvertError
from sla_megatron.commands.convert.hf_folder import write_model_files
from sla_megatron.commands.convert.hf_reader import HFSource
from tests.support.foreign_models import LLAMA3, edit_config, save_ours

pytestmark = pytest.mark.filterwarnings("ignore")

#: Scaling, and Megatron's flags of it.
SCALING: dict[str, tuple[dict[str, Any] | None, list[str]]] = {
    "none": (None, []),
    "linear": ({"rope_type": "linear", "factor": 2.0}, ["--rotary-seq-len-interpolation-factor", "2"]),
    "llama3": ({"rope_type": "llama3", **LLAMA3}, ["--use-rope-scaling", "--rope-scaling-factor", "8.0"]),
}


def old(scaling: dict[str, Any] | None) -> dict[str, Any]:
    return {"rope_theta": 500.0, "rotary_percent": 0.5} | ({} if scaling is None else {"rope_scaling": scaling})


def new(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """transformers' own, of its older names of the same."""
    llama = LlamaConfig(
        rope_theta=500.0, partial_rotary_factor=0.5, rope_scaling=None if scaling is None else dict(scaling)
    )
    return {"rope_parameters": llama.rope_parameters}


@pytest.mark.parametrize("name", SCALING)
def test_both_names_are_written(name: str, tmp_path: Path) -> None:
    scaling, _ = SCALING[name]
    fields = {"position_embedding_type": "rope", "rope_scaling": None} | old(scaling)
    write_model_files(tmp_path, fields, torch.float32, {})
    written = json.loads((tmp_path / "config.json").read_text())
    assert {field: written[field] for field in written if field.startswith("ro")} == old(scaling) | new(scaling)


def test_there_is_no_rope_parameters_without_rotary_positions(tmp_path: Path) -> None:
    write_model_files(tmp_path, {"position_embedding_type": "learned_absolute"} | old(None), torch.float32, {})
    assert "rope_parameters" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("name", SCALING)
def test_either_name_is_read(name: str, tmp_path: Path) -> None:
    scaling, flags = SCALING[name]
    save_ours(tmp_path, position_embedding_type="rope", head_dim=8, max_position_embeddings=9000)
    names = ("rope_theta", "rotary_percent", "rope_scaling", "rope_parameters")
    for said in (old(scaling), new(scaling), old(scaling) | new(scaling)):
        edit_config(tmp_path, *(field for field in names if field not in said), **said)
        argv = argv_from_config(HFSource(tmp_path).config)
        expected = ["--rotary-base", "500", "--rotary-percent", "0.5", *flags]
        start = argv.index("--rotary-base")
        assert argv[start : start + len(expected)] == expected
        others = argv[:start] + argv[start + len(expected) :]
        assert not any("rope" in word.removeprefix("rope") or "rotary" in word for word in others)

    # And not where they say different things.
    edit_config(tmp_path, **old(scaling), **new({"rope_type": "dynamic", "factor": 2.0}))
    field = "rope_scaling" if scaling else "rope_theta"
    edit_config(tmp_path, **({} if scaling else {"rope_theta": 1e4}))
    wanted = rf"{re.escape(str(tmp_path / 'config.json'))}: SlaGPTConfig: {field} must not contradict rope_parameters "
    with pytest.raises(ConvertError, match=rf"^{wanted}[^\n]*$"):
        HFSource(tmp_path)
