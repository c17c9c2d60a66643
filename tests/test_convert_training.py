"""Checkpoints of real, sharded training runs: exported, compared, brought back, trained on; the command; its memory."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference import ReferenceGPT
from tests.support.convert_models import save_random_checkpoint
from tests.support.launch import ROOT
from tests.support.pipelines import FOUR_RANKS, GLOBAL_BATCH, GROUPS, LAYERS, MICRO_BATCH, MODELS
from tests.support.runs import argv, train_on_all_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

SAVED_AT = 2
#: Of 128 rows of the vocabulary, 7 are padding.
VOCABULARY = 121

RUNS = {
    "gqa-full-long-and-short": "tp2pp2v2",
    "mha-pruned-two-long": "tp2pp2",
    "mha-full-short": "cp2pp2v2",
}
#: The one of ``MODELS`` of which the dense one has the shape.
SHAPE = MODELS["gqa-full-long-and-short"]
#: SkipV1Former's setting: half of the groups read the values of layer 1.
SKIPV1 = {"sla_share": "values", "sla_source_layer": [1], "sla_num_skip_groups": 0.5, "sla_kv_projection": "pruned"}
#: How docs/checkpoints.md goes on from what it made.
GO_ON = re.search(
    r"^launch/local.sh (--load skipv1 .*) --save checkpoints \.\.\.$",
    (ROOT / "docs/checkpoints.md").read_text(),
    re.MULTILINE,
)


def _flags(name: str, **flags: Any) -> list[str]:
    base = {"vocab_size": VOCABULARY, "eval_iters": 0, "lr": 1e-2, "train_iters": SAVED_AT}
    model = (SHAPE if name == "dense" else MODELS[name]).argv()
    if name == "dense":
        model = {flag: value for flag, value in model.items() if not flag.startswith("sla")}
    return argv(**model | base | flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<name>/megatron``: after two steps on four ranks, with optimizer state; ``<name>/hf`` and ``<name>/back``.

    ``dense/skipv1`` is made of ``dense/megatron``.
    """
    from sla_megatron.commands.convert.commands import hf_to_megatron, megatron_to_hf, open_megatron
    from sla_megatron.commands.convert.dense_to_sla import WithSLA
    from sla_megatron.commands.convert.hf_reader import HFSource

    folder = tmp_path_factory.mktemp("trained")
    saves = {
        name: _flags(name, **FOUR_RANKS[layout].argv(), save=folder / name / "megatron", save_interval=SAVED_AT)
        for name, layout in (RUNS | {"dense": "tp2pp2"}).items()
    }
    train_on_all_ranks({name: {"argv": flags} for name, flags in saves.items()}, 4, folder / "ranks")
    for name in RUNS:
        megatron_to_hf(open_megatron(folder / name / "megatron"), folder / name / "hf")
        hf_to_megatron(HFSource(folder / name / "hf"), folder / name / "back")
    hf_to_megatron(WithSLA(open_megatron(folder / "dense" / "megatron"), **SKIPV1), folder / "dense" / "skipv1")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_logits_of_a_sharded_run(trained: Path, name: str) -> None:
    """Saved at TP=2 x PP=2, interleaved, and with context parallelism: Megatron's logits and the export's."""
    from sla_megatron.commands.convert.commands import open_megatron
    from sla_megatron.commands.convert.verify import THRESHOLD, compare

    source = open_megatron(trained / name / "megatron")
    assert source.config["vocab_size"] == VOCABULARY
    assert compare(source, trained / name / "hf").relative <= THRESHOLD


@pytest.fixture(scope="module")
def gone_on(trained: Path) -> dict[str, list[dict[str, Any]]]:
    """Two steps on two ranks from each of ``CAME_BACK``, and from its original; and from the dense model with SLA.

    All are loaded in another layout than they were saved in.  ``dense/batches`` and ``dense/saved`` are written.
    """
    starts = {}
    for name in CAME_BACK:
        original = {"load": trained / name / "megatron", "finetune": True, "no_load_optim": True, "no_load_rng": True}
        starts[f"{name}.original"] = {"argv": _flags(name, **original)}
        starts[f"{name}.back"] = {"argv": _flags(name, load=trained / name / "back")}
    dense = trained / "dense"
    words = GO_ON[1].replace("skipv1", str(dense / "skipv1")).split()
    starts["skipv1"] = {
        "argv": [*_flags("dense", save=dense / "saved", save_interval=SAVED_AT), *words],
        "entry": str(ROOT / "tests" / "support" / "recorded_batches.py"),
        "environment": {"SLA_TEST_BATCHES": str(dense / "batches")},
    }
    return train_on_all_ranks(starts, 2, trained / "going-on")


CAME_BACK = list(RUNS)[:2]


def test_training_goes_on_from_what_came_back(gone_on: dict[str, list[dict[str, Any]]]) -> None:
    """The same losses and gradient norms, bit for bit, as from the original's weights: padded rows came back too."""
    answers = gone_on
    for name in CAME_BACK:
        for ours, theirs in zip(answers[f"{name}.back"], answers[f"{name}.original"], strict=True):
            assert ours["status"] == theirs["status"] == 0, ours["stderr"]
            assert ours["iteration"] == [1, 2]
            for what in ("loss", "grad_norm"):
                assert ours[what] == theirs[what]


def test_a_dense_model_goes_on_with_sla(trained: Path, gone_on: dict[str, list[dict[str, Any]]]) -> None:
    """The first loss is the reference's, of the dense model's weights; what was trained is exported and equal."""
    from sla_megatron.commands.convert.commands import megatron_to_hf, open_megatron
    from sla_megatron.commands.convert.megatron_model import megatron_alone
    from sla_megatron.commands.convert.trained_model import trained_model
    from sla_megatron.commands.convert.verify import THRESHOLD, compare

    answer, folder = gone_on["skipv1"][0], trained / "dense"
    assert answer["status"] == 0, answer["stderr"]
    assert answer["iteration"] == [1, 2] and all(map(math.isfinite, answer["loss"]))

    batches = torch.load(folder / "batches")[: GLOBAL_BATCH // MICRO_BATCH]
    tokens, labels = map(torch.cat, zip(*batches, strict=True))
    with megatron_alone():
        model = trained_model(open_megatron(folder / "megatron"))
        weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    sizes = LAYERS, SHAPE.heads, GROUPS, SHAPE.head_size
    losses = [
        float(ReferenceGPT(*sizes, rope=True, rms_norm=True, **meant).loss(weights, tokens, labels))
        for meant in ({"source_layers": (1,), "num_skip_groups": 2, "share": "values"}, {})
    ]
    assert answer["loss"][0] == pytest.approx(losses[0], rel=1e-6)
    # The dense model's is another.
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)

    source = open_megatron(folder / "saved")
    megatron_to_hf(source, folder / "hf")
    written = json.loads((folder / "hf" / "config.json").read_text())
    assert (written["sla_share"], written["sla_source_layers"], written["sla_skip_distances"]) == ("values", [1], [])
    assert compare(source, folder / "hf").relative <= THRESHOLD


@pytest.fixture
def convert(convert_streams: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str]]:
    """``sla-convert`` with these words: its exit status and what it printed."""
    return lambda *words: convert_streams(*words)[:2]


def test_the_command(trained: Path, tmp_path: Path, convert: Callable[..., tuple[int, str]], card: Callable) -> None:
    """Export with verification, in shards and another type; describe; verify, which finds other weights."""
    name = "gqa-full-long-and-short"
    checkpoint = trained / name / "megatron"
    status, printed = convert("megatron-to-hf", checkpoint, tmp_path / "out", "--verify", "--max-shard-size", "20KB")
    assert status == 0
    found = re.search(r"logits equal; relative error (\d\.\d\de-0[678]), largest difference", printed)
    assert found
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 5

    # Without dead rows, against Megatron's model, which has them.
    status, printed = convert("megatron-to-hf", checkpoint, tmp_path / "pruned", "--verify", "--prune")
    assert status == 0 and "logits equal" in printed
    sizes = [sum(file.stat().st_size for file in (tmp_path / which).glob("model*")) for which in ("out", "pruned")]
    assert sizes[1] < sizes[0]

    from transformers import AutoModelForCausalLM

    from sla_megatron.commands.convert.commands import megatron_to_hf, open_megatron

    megatron_to_hf(open_megatron(checkpoint / "iter_0000002"), tmp_path / "half", torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", trust_remote_code=True).dtype == torch.bfloat16

    status, printed = convert("describe", checkpoint)
    assert status == 0
    assert "num_key_value_heads: 4" in printed
    assert re.search(r"layers\.7\.self_attn\.k_proj\.weight +16x32  key +decoder\.layers\.self_attention", printed)

    # The bf16 weights differ by their rounding, 4e-3.
    status, printed = convert("verify", checkpoint, tmp_path / "half")
    assert status == 1
    assert "logits NOT equal (threshold 1e-05)" in printed
    results = {"logits, relative error": float(found[1]), "bytes of weights": sizes[0], "pruned": sizes[1]}
    card("conversion", "sla-convert megatron-to-hf checkpoints exported --verify --max-shard-size 20KB", results)


MEMORY = """
import resource, sys
from pathlib import Path
from sla_megatron.commands.convert.commands import hf_to_megatron, megatron_to_hf, open_megatron
from sla_megatron.commands.convert.hf_reader import HFSource
from sla_megatron.commands.convert.megatron_model import megatron_alone

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def main(direction, source, out, shard):
    # What the libraries take is loaded before.
    if direction == "megatron-to-hf":
        source = open_megatron(source)
        source.get("model.norm.weight")
        before = peak()
        megatron_to_hf(source, out, max_shard_bytes=shard)
    else:
        with megatron_alone():
            pass
        before = peak()
        hf_to_megatron(HFSource(source), out)
    print(peak() - before)

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
"""


def test_memory(tmp_path: Path) -> None:
    """A model of 200 MB: to Hugging Face, in shards of 20 MB, and back, where all of it is one file.

    The peak is less than 1.5 times the largest file above what the libraries take, but for 30 MB: copying files and
    writing configurations load modules of their own.
    """
    shard = 20_000_000
    flags = {"num_layers": 16, "hidden_size": 512, "ffn_hidden_size": 2048, "num_attention_heads": 8}
    save_random_checkpoint(tmp_path / "megatron", flags)
    script = tmp_path / "measure.py"
    script.write_text(MEMORY)

    def added(*words: str | Path) -> int:
        run = subprocess.run(
            [sys.executable, script, *words, str(shard)],
            capture_output=True,
            text=True,
            timeout=200,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert run.returncode == 0, run.stderr
        return int(run.stdout.split()[-1])

    exporting = added("megatron-to-hf", tmp_path / "megatron", tmp_path / "hf")
    whole = sum(path.stat().st_size for path in (tmp_path / "hf").glob("model-*.safetensors"))
    assert whole > 9 * shard
    assert exporting < 1.5 * shard + 30_000_000
    assert added("hf-to-megatron", tmp_path / "hf", tmp_path / "back") < 1.5 * whole + 30_000_000
