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
from tests.support.foreign_models import save_foreign, save_ours, tensors
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, ``hf``, and a model of ours that skips, ``ours``."""
    folder = tmp_path_factory.mktemp("folders")
    save_foreign(folder / "hf")
    save_ours(folder / "ours")
    return folder


def test_of_a_hugging_face_folder(folders: Path, tmp_path: Path, convert: Callable[..., tuple[int, str]]) -> None:
    """The checkpoint's weights are the folder's, and its settings those of the flags, counted."""
    status, said = convert("dense-to-sla", folders / "hf", tmp_path / "sla", *COMMANDS["skipv1"])
    assert status == 0, said
    found = open_megatron(tmp_path / "sla")
    asked = {name: value for name, value in vars(found.args).items() if name.startswith("sla")}
    assert asked == {
        **{"sla": True, "sla_share": "values", "sla_source_layer": [1], "sla_skip_distance": None},
        **{"sla_num_skip_groups": 1, "sla_layers": "2-4", "sla_kv_projection": "full"},
    }
    given = tensors(folders / "hf")
    assert [name for name, tensor in given.items() if not torch.equal(found.get(name), tensor)] == []


#: What is converted, flags, and the line.  The Llama has 4 layers and 2 groups.
REFUSED: dict[str, tuple[str, str, str]] = {
    "share": ("hf", "--sla-share queries", "--sla-share queries: expected kv or values or keys"),
    "source": ("hf", "--sla-source-layer 5", "--sla-source-layer 5: expected one or more layers within 1-4"),
    "no source": ("hf", "--sla-source-layer", "--sla-source-layer without a value: expected one or more layers within"),
    "share of layers": ("hf", "--sla-source-layer 1.5", "--sla-source-layer 1.5: expected one or more layers, counted"),
    "too many": ("hf", "--sla-source-layer 1 2 3", "--sla-source-layer 1 2 3: expected at most as many source layers"),
    "both": (
        "hf",
        "--sla-source-layer 1 --sla-skip-distance 1",
        "--sla-source-layer 1: expected no --sla-skip-distance beside it",
    ),
    "groups": ("hf", "--sla-num-skip-groups 3", "--sla-num-skip-groups 3: expected an integer from 0 to 2"),
    "layers": (
        "hf",
        "--sla-source-layer 2 --sla-layers 2-/2",
        "--sla-layers 2-/2: expected layers beyond the source layer 2: 3-4",
    ),
    "skips already": ("ours", "--sla-share values", "ours: it is a skip-layer model already"),
    "a checkpoint's": ("hf", "--override bf16=True", "--override bf16: expected a checkpoint beside it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(folders: Path, tmp_path: Path, convert: Callable[..., tuple[int, str]], name: str) -> None:
    """In one line, as pretraining refuses it, with nothing written."""
    folder, flags, line = REFUSED[name]
    status, said = convert("dense-to-sla", folders / folder, tmp_path / "sla", *flags.split())
    (found,) = [text for text in said.splitlines() if text.startswith("sla-convert: error: ")]
    assert (status, line in found, list(tmp_path.iterdir())) == (2, True, []), found
