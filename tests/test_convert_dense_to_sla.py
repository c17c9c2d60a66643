"""``sla-convert dense-to-sla``: the documented commands make of a dense model what ``tests/reference.py`` defines."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sla_megatron.commands.convert.commands import open_megatron
from sla_megatron.commands.convert.mapping import entries
from sla_megatron.commands.convert.megatron_model import megatron_alone
from sla_megatron.commands.convert.trained_model import trained_model
from sla_megatron.commands.convert.verify import THRESHOLD, megatron_model
from tests.reference import ReferenceGPT
from tests.support.argument_rows import SWIGLU
from tests.support.convert_models import HEADS, LAYERS, LENGTH, VOCABULARY, save_random_checkpoint
from tests.support.foreign_models import save_foreign
from tests.support.launch import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
#: Where a documented command writes -> its flags.
COMMANDS = {
    out: flags.split() for out, flags in re.findall(r"^sla-convert dense-to-sla dense (\S+) ?(.*)$", PAGE, re.MULTILINE)
}

#: With 4 layers and 4 groups: what each of them is, in the reference's words.
MEANT: dict[str, dict[str, Any]] = {
    "sla": {"distances": (3,), "num_skip_groups": 3},
    "sla-short": {"distances": (1,), "num_skip_groups": 3, "consumer_layers": (4,)},
    "values": {"distances": (3,), "num_skip_groups": 3, "share": "values"},
    "keys": {"distances": (3,), "num_skip_groups": 3, "share": "keys"},
    "skipv1": {"source_layers": (1,), "num_skip_groups": 2, "share": "values"},
    "cla2": {"distances": (1,), "num_skip_groups": 4, "consumer_layers": (2, 4)},
    "half-shared": {"source_layers": (2,), "num_skip_groups": 4},
}
#: Each key has a norm; where a layer has no keys of its own, it has none.
DENSE = SWIGLU | {"rotary_base": 10000, "num_query_groups": HEADS, "qk_layernorm": True, "add_qkv_bias": True}
HEAD_SIZE = 8


def reference(**meant: Any) -> ReferenceGPT:
    return ReferenceGPT(LAYERS, HEADS, HEADS, HEAD_SIZE, rope=True, rms_norm=True, swiglu=True, **meant)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint ``dense``."""
    folder = tmp_path_factory.mktemp("dense")
    save_random_checkpoint(folder / "dense", DENSE)
    return folder


@pytest.fixture(scope="module")
def expected(dense: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens ``[b, s]``, and their logits by each setting, of the dense model's weights: all of them, dead or not."""
    with megatron_alone():
        model = trained_model(open_megatron(dense / "dense"))
        weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    settings = {"dense": {}} | MEANT
    return tokens, {
        name: reference(**meant).logits(weights, tokens)[..., :VOCABULARY] for name, meant in settings.items()
    }


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_each_setting_is_another_function(expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """So that none is taken for another one below."""
    logits = expected[1]
    assert list(COMMANDS) == list(MEANT)
    near = [(a, b) for a in logits for b in logits if a < b and relative(logits[a], logits[b]) < 1000 * THRESHOLD]
    assert near == []


@pytest.mark.parametrize("projection", ["full", "pruned"])
@pytest.mark.parametrize("name", MEANT)
def test_the_documented_commands(
    dense: Path,
    expected: tuple[Tensor, dict[str, Tensor]],
    tmp_path: Path,
    convert: Callable[..., tuple[int, str]],
    name: str,
    projection: str,
) -> None:
    """The function, by Megatron's model; and the rows of keys and of values that are left."""
    words = (*COMMANDS[name], "--sla-kv-projection", projection)
    status, said = convert("dense-to-sla", dense / "dense", tmp_path / "sla", *words)
    assert status == 0, said
    source, (tokens, logits) = open_megatron(tmp_path / "sla"), expected
    with megatron_model(source) as computed:
        assert relative(computed(tokens), logits[name]) <= THRESHOLD

    meant = reference(**MEANT[name], pruned=projection == "pruned")
    found = {entry.hf: entry.shape[0] for entry in entries(source.config)}
    for kind in ("key", "value"):
        for layer in range(1, LAYERS + 1):
            rows = HEAD_SIZE * sum(meant.is_projected(layer, group, kind) for group in range(HEADS))
            names = [f"model.layers.{layer - 1}.self_attn.{kind[0]}_proj.{part}" for part in ("weight", "bias")]
            assert [found.get(name, 0) for name in names] == [rows, rows]
