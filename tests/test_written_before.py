"""What commit e565a8e wrote is read, and gone on with: a checkpoint, an export, text data, a chain, a sweep.

tests/data/e565a8e/README.md says how each was made.  All that is expected is what e565a8e itself printed or wrote when
it went on from the same files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sla_megatron.commands.data import cli as data_cli
from tests.support.launch import ROOT, rank_environment, start_ranks, wait_for_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

WRITTEN = ROOT / "tests" / "data" / "e565a8e"
EXPECTED = WRITTEN / "expected"
#: The vocabulary's padding, where it lies now and where it lay then.
PADDING = ("megatron/padding.safetensors", "megatron_padding.safetensors")

#: Kernels that every x86 processor has: all digits are then the same everywhere.
SAME_DIGITS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}

#: The flags that the checkpoints were made with; each stopped at iteration 3.
TRAINING = (
    "--device cpu --num-layers 4 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 4 "
    "--seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4 --train-iters 6 "
    "--lr 0.01 --lr-warmup-iters 1 --lr-decay-iters 20 --clip-grad 1.0 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 121 --make-vocab-size-divisible-by 128 "
    "--log-interval 1 --eval-iters 0 --eval-interval 100 --save-interval 3"
)
SLA = {
    "full": "--sla --sla-skip-distance 2",
    "pruned": "--sla --sla-skip-distance 1 --sla-kv-projection pruned "
    "--position-embedding-type rope --normalization RMSNorm",
}

#: Relative error in the 2-norm: the kernels of another processor add in another order.
ROUNDING = 1e-6


def copied(name: str, folder: Path) -> Path:
    """A copy of what was written, as if it had been written there: only its place changes."""
    copy = shutil.copytree(WRITTEN / name, folder / name)
    if name.startswith("export/"):
        # The code is the same in every export, and kept once.
        for path in (WRITTEN / "export" / "full").glob("*_sla_gpt.py"):
            shutil.copy(path, copy)
    for path in copy.rglob("*.json"):
        text = path.read_text()
        if "@HERE@" in text:
            path.write_text(text.replace("@HERE@", str(copy)))
    return copy


def command(module: str, *words: object, at: Path, status: int = 0, **settings: str) -> subprocess.CompletedProcess:
    """Run one of our commands in the folder ``at``; it ends with ``status``."""
    inherited = {name: value for name, value in rank_environment(0, 1, 0).items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=at,
        env=inherited | SAME_DIGITS | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def steps(log: str) -> list[str]:
    """All that was printed of each step, but when it was and how long it took."""
    lines = re.findall(r"\] (iteration +\d+/ +\d+ \|.*)", log)
    return [re.sub(r" elapsed time per iteration \(ms\): \S+ \|", "", line) for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each checkpoint's folder, after training went on there; both side by side."""
    folders = {name: copied(f"checkpoint/{name}", tmp_path_factory.mktemp(name)) for name in SLA}
    ranks = {}
    with pytest.MonkeyPatch.context() as environment:
        for variable, value in SAME_DIGITS.items():
            environment.setenv(variable, value)
        for name, folder in folders.items():
            flags = [*TRAINING.split(), *SLA[name].split(), "--load", str(folder), "--save", str(folder)]
            ranks[name] = start_ranks(["-m", "sla_megatron.pretrain_gpt", *flags], 1, folder.parent)
    for name, folder in folders.items():
        wait_for_ranks(ranks[name], folder.parent, timeout=300)
    return folders


@pytest.mark.parametrize("name", SLA)
def test_training_goes_on_from_a_checkpoint(name: str, trained: dict[str, Path]) -> None:
    """Iterations 4 to 6 from the checkpoint of iteration 3, dropout included: e565a8e's, to all printed digits.

    Expected: the lines that e565a8e printed when it went on itself.
    """
    expected = steps((EXPECTED / f"{name}.log").read_text())
    assert [re.search(r"\d+", line)[0] for line in expected] == ["4", "5", "6"]
    assert steps((trained[name].parent / "rank0.log").read_text()) == expected
    assert (trained[name] / "latest_checkpointed_iteration.txt").read_text() == "6"


@pytest.fixture
def convert(convert_streams: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """``sla-convert`` with these words, which ends well: what it printed."""

    def run(*words: str | Path) -> str:
        status, out, err = convert_streams(*words)
        assert status == 0, out + err
        return out

    return run


@pytest.mark.parametrize("name", SLA)
def test_an_export_loads(name: str, tmp_path: Path) -> None:
    """Through its own code and as our class: the logits.

    Expected: those of e565a8e's code.
    """
    from transformers import AutoModelForCausalLM

    from sla_megatron.hf.modeling_sla_gpt import SlaGPTForCausalLM

    expected = load_file(EXPECTED / f"{name}.logits.safetensors")
    folder = copied(f"export/{name}", tmp_path)
    with torch.no_grad():
        own_code = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        for model in (own_code, SlaGPTForCausalLM.from_pretrained(folder).eval()):
            found = model(expected["tokens"]).logits
            assert (found - expected["logits"]).norm() <= ROUNDING * expected["logits"].norm()


@pytest.mark.parametrize("name", SLA)
def test_checkpoints_and_exports_convert(name: str, tmp_path: Path, convert: Callable[..., str]) -> None:
    """The checkpoint and the export of it are equal; the checkpoint is exported anew; the export comes back.

    Expected: the weights that e565a8e exported, byte for byte, and its settings.
    """
    checkpoint, export = copied(f"checkpoint/{name}", tmp_path), copied(f"export/{name}", tmp_path)
    assert "logits equal" in convert("verify", checkpoint, export)
    convert("megatron-to-hf", checkpoint, tmp_path / "anew")
    convert("hf-to-megatron", export, tmp_path / "back")
    convert("megatron-to-hf", tmp_path / "back", tmp_path / "again")
    for made in ("anew", "again"):
        for file, name in (("model.safetensors", "model.safetensors"), PADDING):
            assert (tmp_path / made / file).read_bytes() == (export / name).read_bytes(), (made, file)
        # Engines read every file of the folder itself as weights.
        assert [path.name for path in (tmp_path / made).glob("*.safetensors")] == ["model.safetensors"]
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (export, tmp_path / made))
        # Since then, heads have been added, and rotary embedding by its newer name too.
        assert before.pop("auto_map").items() < after.pop("auto_map").items()
        after.pop("rope_parameters", None)
        assert after == before


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A finished data set and one that was killed, with the text and the tokenizer that both are made from.

    Both hold what they were made with, and are gone on with only where all of it is the same.  Of that, place, time and
    versions are changed here, and nothing else; they are what e565a8e would have written on this machine:

    - the path of the text (in :func:`copied`), which is absolute.  That it is the same text still shows: its length,
      which is stored too, stays, and the tokenizer's hash;
    - when the text was written, which git does not keep: the file is given the stored time;
    - the versions of libraries.  Others are refused, rightly, and nothing about the format.
    """
    folder = copied("data", tmp_path)
    for path in (folder / "finished.json", folder / "interrupted.sla-data" / "settings.json"):
        content = json.loads(path.read_text())
        settings = content.get("settings", content)
        written = settings["inputs"]["sources"][0]["modified_ns"]
        os.utime(folder / "corpus.jsonl", ns=(written, written))
        settings["versions"] = {library: version(library) for library in settings["versions"]}
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def sla_data(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[str], str]:
    """``sla-data`` with these flags, where the data lie: what it prints."""
    monkeypatch.chdir(data)

    def run(flags: str) -> str:
        data_cli.main(flags.split())
        return capsys.readouterr().out

    return run


def tokenize(prefix: str) -> str:
    """The flags that made both data sets."""
    flags = "tokenize --input corpus.jsonl --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model"
    return f"{flags} --deduplicate --on-error skip --shard-mb 0.001 --output-prefix {prefix}"


def contents(folder: Path, prefix: str) -> dict[str, bytes]:
    return {suffix: (folder / f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "faults")}


def test_finished_data_is_sound(sla_data: Callable[[str], str]) -> None:
    """Expected: what e565a8e's ``sla-data inspect`` printed."""
    assert sla_data("inspect finished") == (EXPECTED / "inspect.txt").read_text()


def test_finished_data_is_not_made_again(data: Path, sla_data: Callable[[str], str]) -> None:
    """The same command says so, and leaves all files as they are."""
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in data.glob("finished.*")}
    assert len(before) == 4
    assert sla_data(tokenize("finished")).startswith("finished.json: nothing to do\n")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in data.glob("finished.*")} == before


def test_interrupted_data_is_finished(data: Path, sla_data: Callable[[str], str]) -> None:
    """From the three shards of five that the kill left.

    Expected: what e565a8e printed when it went on itself; the bytes that it wrote undisturbed.
    """
    assert len(list(data.glob("interrupted.sla-data/shards/*.json"))) == 3
    assert sla_data(tokenize("interrupted")) == (EXPECTED / "goes-on.txt").read_text()
    assert contents(data, "interrupted") == contents(data, "finished")
    made, finished = (json.loads((data / f"{prefix}.json").read_text()) for prefix in ("interrupted", "finished"))
    assert made.pop("outputs")["all"] == finished.pop("outputs")["all"] | {"prefix": "interrupted"}
    assert made == finished
    assert not (data / "interrupted.sla-data").exists()


def test_a_chain_goes_on(tmp_path: Path) -> None:
    """Three attempts, of which one was preempted, one failed and one ended without a word, around a real checkpoint.

    Expected: what e565a8e's ``show`` and ``begin`` printed.
    """
    run = copied("chain", tmp_path)
    shutil.copytree(WRITTEN / "checkpoint" / "full", run / "checkpoints")
    job, flags = "sla_megatron.commands.job.cli", "--save chain/checkpoints --load chain/checkpoints --train-iters 6"
    slurm = {"SLURM_JOB_ID": "101", "SLURM_JOB_NODELIST": "node[1,3]"}
    before = json.loads((run / "chain.json").read_text())["attempts"]
    # Since then, after how the run is.
    assert command(job, "show", "--run", "chain", at=tmp_path).stdout.endswith((EXPECTED / "show.txt").read_text())
    begun = command(job, "begin", "--run", "chain", "--", *flags.split(), at=tmp_path, **slurm)
    assert begun.stdout == (EXPECTED / "begin.txt").read_text()
    after = json.loads((run / "chain.json").read_text())["attempts"]
    assert len(after) == 4 and after[:2] == before[:2]
    assert (after[2]["ended_at"], after[2]["how"], after[3]["began_at"]) == (3, "without a word", 3)
    # Two failures in a row: without a new checkpoint the next one is a third.
    stopped = command(job, "end", "--run", "chain", "--status", "1", "--", *flags.split(), at=tmp_path, status=3)
    assert "stopping: 3 attempts in a row failed" in stopped.stdout


@pytest.mark.slow
def test_a_sweep_goes_on(tmp_path: Path) -> None:
    """One run is finished, the other was killed in its fifth iteration: the report, then what is missing is trained.

    Expected: e565a8e's report of the same folder, and the row that it wrote when it went on itself.
    """
    folder = copied("sweep", tmp_path)
    module = "sla_megatron.commands.sweep.cli"
    reported = command(module, "report", "--out", "out", at=folder)
    assert reported.stdout == (EXPECTED / "report.txt").read_text()
    assert "begun and not finished: tiny-c16-n2-k2-s1" in reported.stderr
    row = folder / "out" / "runs" / "tiny-c16-dense-s1" / "row.json"
    before = row.read_bytes(), row.stat().st_mtime_ns
    ran = command(
        module, "run", "grid.yaml", "--out", "out", "--device", "cpu", at=folder, NPROC="1", PYTHON=sys.executable
    )
    assert "1 of 2 runs are finished, 1 to do" in ran.stdout
    assert (row.read_bytes(), row.stat().st_mtime_ns) == before
    rows = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    assert rows[0] == json.loads(before[0])
    assert measured(rows[1]) == measured(json.loads((EXPECTED / "row.json").read_text()))
    launches = re.findall(r"^\$ bash ", (row.parents[1] / rows[1]["name"] / "train.log").read_text(), re.MULTILINE)
    assert len(launches) == 2


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """A row without when and how fast it was trained, and by which commit on which machine."""
    varies = ("tokens_per_second", "seconds", "attempt_seconds", "finished", "commit", "machine")
    return {name: value for name, value in row.items() if name not in varies}
