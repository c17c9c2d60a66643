"""The page on data: its commands run as they stand, on a small corpus under the names that they use."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import datasets
import pytest

from sla_megatron.commands.data import cli
from sla_megatron.commands.data.documents import FAULTS
from tests.support.launch import ROOT
from tests.support.runs import argv, figures, train_on_all_ranks
from tests.support.tokenizers import hugging_face_folder, train_sentencepiece

PAGE = (ROOT / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
(CLUSTER,) = [block for block in BLOCKS if block.startswith("sla-data submit")]
#: A small corpus has no 32,000 tokens; two workers show as much as 32.
SMALLER = {"--vocab-size 32000": "--vocab-size 500", "--workers 32": "--workers 2", "99,0.5,0.5": "70,15,15"}


@pytest.mark.distributed
def test_the_recipe_for_openwebtext(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Both tokenizers' commands, then pretraining with the flags that the page gives."""
    hugging_face_folder(tmp_path / "openai-community" / "gpt2")
    texts = [f"Page {i}. " + "It was read by many people. " * (i % 9) for i in range(300)]
    (tmp_path / "Skylion007" / "openwebtext").mkdir(parents=True)
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "Skylion007" / "openwebtext" / "0.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    commands = [block for block in BLOCKS if block.startswith("sla-data") and block != CLUSTER]
    for command in "".join(commands).replace("\\\n", "").splitlines():
        for long, short in SMALLER.items():
            command = command.replace(long, short)
        cli.main(shlex.split(command)[1:])
    printed = capsys.readouterr().out
    assert printed.count("sound: the index and all tokens were checked") == 3
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        *("owt.json", "owt-sp.json", "owt.model"),
        *(f"{name}_{split}.{suffix}" for name in ("owt", "owt-sp") for split in ("train", "valid", "test")
          for suffix in ("bin", "idx")),
    }  # fmt: skip
    (flags,) = [block for block in BLOCKS if block.startswith("    --tokenizer-type HuggingFaceTokenizer")]
    given = [str(tmp_path / part) if "/" in part else part for part in shlex.split(flags.replace("\\\n", ""))]
    own = argv(mock_data=None, tokenizer_type=None, vocab_size=None, train_iters=2)
    answers = train_on_all_ranks({"owt": {"argv": [*own, *given]}}, 2, tmp_path / "runs")
    run = figures(answers["owt"])
    assert run["iteration"] == [1, 2] and all(map(math.isfinite, run["loss"]))


def test_the_command_for_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As it stands it is one that sbatch would be given; its tasks, here, make a sound data set."""
    for folder in ("corpus", "data"):
        (tmp_path / folder).mkdir()
    train_sentencepiece(tmp_path / "data" / "owt.model", eos_id=2, pad_id=3)
    for name in ("a", "b"):
        (tmp_path / "corpus" / f"{name}.txt").write_text("A document a line.\n" * 50)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(CLUSTER.replace("\\\n", ""))[1:]
    end = words.index("--")
    cli.main([*words[:end], "--dry-run", *words[end:]])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all(line.startswith("sbatch ") and " --partition=cpu " in line for line in printed)
    cli.main([*words[:end], "--local"])
    cli.main(["inspect", "data/corpus"])
    printed = capsys.readouterr().out
    assert "data/corpus: 100 documents" in printed and "sound: the index and all tokens were checked" in printed


def test_every_kind_of_fault_is_described() -> None:
    assert re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE.partition("## Faults")[2], flags=re.MULTILINE) == list(FAULTS)


def test_every_command_is_described() -> None:
    names = [module.__name__.rpartition(".")[2].removesuffix("_command") for module in cli.COMMANDS]
    assert re.findall(r"^\| `([a-z]+)` \|", PAGE.partition("## OpenWebText")[0], flags=re.MULTILINE) == names
