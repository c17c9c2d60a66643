"""sla-data submit: a corpus divided among tasks gives the files of one process, whatever happens to the tasks."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece

from sla_megatron.commands.data.cli import main
from tests.support.launch import ROOT
from tests.support.slurm import Cluster, cluster, missing, processes_with
from tests.support.tokenizers import train_sentencepiece

SUFFIXES = (".bin", ".idx", ".json", ".faults")
NO_OBJECT = "{no JSON"


def some_texts(seed: int, count: int) -> list[str]:
    source = random.Random(seed)
    words = ("word", "naïve", "中文", "return", "def f(x):")
    return [f"{i}: " + " ".join(source.choices(words, k=source.randrange(1, 300))) for i in range(count)]


#: The input, in order: the first is far larger than a third of it, its text cut by tasks.
TEXTS = {
    name: some_texts(seed, count)
    for seed, (name, count) in enumerate(
        {"a.jsonl": 3000, "b.jsonl.gz": 300, "c.parquet": 200, "d.txt": 400, "e.jsonl": 100, "f.jsonl": 1}.items()
    )
}
#: Faulty lines: file -> its line in that file.
FAULTS = {"a.jsonl": 2500, "e.jsonl": 50}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    train_sentencepiece(folder / "t.model", eos_id=2, pad_id=3)
    for name, texts in TEXTS.items():
        lines = [json.dumps({"text": text}) for text in texts]
        if name in FAULTS:
            lines.insert(FAULTS[name] - 1, NO_OBJECT)
        content = ("\n".join(texts if name.endswith(".txt") else lines) + "\n").encode()
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / name)
        else:
            (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def flags(corpus: Path, prefix: Path, *more: str) -> list[str]:
    given = ["--input", *(str(corpus / name) for name in TEXTS), "--output-prefix", str(prefix), "--shard-mb", "0.02"]
    return [*given, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(corpus / "t.model"), *more]


@pytest.fixture(scope="module")
def one_process(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What ``sla-data tokenize`` makes of it."""
    prefix = tmp_path_factory.mktemp("one") / "set"
    main(["tokenize", *flags(corpus, prefix, "--on-error", "skip")])
    return contents(prefix)


def contents(prefix: Path) -> dict[str, bytes]:
    assert not prefix.with_name(prefix.name + ".sla-data").exists()
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES}


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm"), 2) as made:
        yield made


def in_cluster(slurm: Cluster, corpus: Path, *words: str) -> subprocess.CompletedProcess:
    settings = os.environ | {name: slurm.environment[name] for name in ("PATH", "SLURM_CONF")}
    return subprocess.run(
        [sys.executable, "-m", "sla_megatron.commands.data.cli", *words],
        cwd=corpus,
        env=settings | {"PYTHONPATH": str(ROOT), "SETUP": str(corpus / "setup.sh")},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(bool(missing()), reason="Slurm is not installed")
def test_a_job_array_makes_the_files_of_one_process(
    slurm: Cluster, corpus: Path, one_process: dict[str, bytes], tmp_path: Path
) -> None:
    """Of three tasks one is killed in the middle and goes on; the faults of all are in one report; sbatch drops the
    environment."""
    prefix = tmp_path / "set"
    (corpus / "setup.sh").write_text("echo sourced; export SOURCED=$NOT_SET; false\n")
    options = ["--", "--export=NONE", "--time=10"]
    command = ["submit", "--tasks", "3", *flags(corpus, prefix)]
    done = in_cluster(slurm, corpus, *command, *options)
    assert done.returncode == 0, done.stderr
    array, merge = re.search(r"job (\d+), the tasks; job (\d+), the merge", done.stdout).groups()
    shards = prefix.with_name("set.sla-data") / "tasks" / "00000.sla-data" / "shards"
    own = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_CONF": slurm.environment["SLURM_CONF"]}
    deadline = time.monotonic() + 60
    while len(list(shards.glob("*.json"))) < 3:
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.005)
    (task,) = [pid for pid in processes_with(b"commands.data.cli", **own) if is_python(pid)]
    os.kill(task, signal.SIGKILL)
    assert not prefix.with_name("set.sla-data").joinpath("tasks", "00000.done").exists(), "it was killed too late"
    busy = in_cluster(slurm, corpus, *command, *options)
    assert busy.returncode == 2 and f"job {array}, {merge} is at work there, or waits" in busy.stderr
    slurm.until(merge, {"COMPLETED", "FAILED"}, seconds=60)
    logs = {path.name: path.read_text() for path in (tmp_path / "set.slurm").glob("*")}
    assert logs[f"{array}_0.log"].count("sourced") == 2 and "back into the queue" in logs[f"{array}_0.log"]
    assert [slurm.job(f"{array}_{task}")["Restarts"] for task in range(3)] == ["1", "0", "0"]
    said = logs[f"merge_{merge}.log"].splitlines()
    # Faults are fatal where nothing else is said.
    assert slurm.job(merge)["ExitCode"] == "2:0" and not Path(f"{prefix}.bin").exists()
    assert [line.partition(": not a JSON")[0] for line in said if "not a JSON" in line] == [
        f"sla-data: {corpus / name}:{line}" for name, line in FAULTS.items()
    ]
    assert "2 documents are faults" in said[-1] and "sla-data submit --on-error skip, which goes on here" in said[-1]
    # All tasks are finished: the merge alone is submitted.
    done = in_cluster(slurm, corpus, *command, "--on-error", "skip", *options)
    (merge,) = re.findall(r"job (\d+)", done.stdout)
    known = slurm.until(merge, {"COMPLETED", "FAILED"}, seconds=60)
    assert known["JobState"] == "COMPLETED", (tmp_path / "set.slurm" / f"merge_{merge}.log").read_text()
    assert contents(prefix) == one_process


def is_python(pid: int) -> bool:
    return Path(f"/proc/{pid}/exe").resolve() == Path(sys.executable).resolve()


def test_documents_are_in_the_order_of_the_input(corpus: Path, tmp_path: Path) -> None:
    """As Megatron reads them, from tasks that run here."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    main(["submit", "--tasks", "3", "--local", *flags(corpus, tmp_path / "set", "--on-error", "skip")])
    data = IndexedDataset(str(tmp_path / "set"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "t.model"))
    texts = [text for texts in TEXTS.values() for text in texts]
    assert [data[i].tolist() for i in range(len(data))] == [[*model.encode(text), 2] for text in texts]
