"""sla-data submit: a corpus divided among tasks gives the files of one process, whatever happens to the tasks."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
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
    given = ["--input", *(str(corpus / name) for name in TEXTS), "--output-prefix", str(prefix), "--shard-mb", "0.05"]
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


@pytest.mark.skipif(bool(missing()), reason="Slurm is not installed")
def test_a_job_array_makes_the_files_of_one_process(
    slurm: Cluster,
    corpus: Path,
    one_process: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """One of three tasks is killed in the middle and goes on; the faults of all are in one report.

    sbatch drops the environment; a file that sets one up is sourced.
    """
    prefix, setup = tmp_path / "set", tmp_path / "setup.sh"
    setup.write_text("echo sourced; export SOURCED=$NOT_SET; false\n")
    for name, value in {**slurm.environment, "SETUP": str(setup)}.items():
        monkeypatch.setenv(name, value)
    options = ["--", "--export=NONE", "--time=10"]
    command = ["submit", "--tasks", "3", *flags(corpus, prefix)]
    capsys.readouterr()
    main([*command, *options])
    array, merge = re.search(r"job (\d+), the tasks; job (\d+), the merge", capsys.readouterr().out).groups()
    shards = prefix.with_name("set.sla-data") / "tasks" / "00000.sla-data" / "shards"
    own = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_CONF": slurm.environment["SLURM_CONF"]}
    deadline = time.monotonic() + 60
    while len(list(shards.glob("*.json"))) < 2:
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.005)
    (task,) = [pid for pid in processes_with(b"commands.data.cli", **own) if is_python(pid)]
    os.kill(task, signal.SIGKILL)
    assert not prefix.with_name("set.sla-data").joinpath("tasks", "00000.done").exists(), "it was killed too late"
    assert f"job {array}, {merge} is at work there, or waits" in refused([*command, *options], capsys)[-1]
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
    main([*command, "--on-error", "skip", *options])
    (merge,) = re.findall(r"job (\d+)", capsys.readouterr().out)
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


def small(folder: Path, tokenizer: Path, *inputs: str) -> list[str]:
    """Flags for files in ``folder``, cut into pieces of 200 bytes or more."""
    given = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer), "--shard-mb", "0.0002"]
    return [*given, *inputs, "--output-prefix", str(folder / "set")]


def refused(words: list[str], capsys: pytest.CaptureFixture) -> list[str]:
    """What the command says on stderr before it ends with status 2, without what it waited for."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()
    return [line for line in said if line.startswith("sla-data") and not re.search(r", \d+ s$", line)]


def test_rows_duplicates_and_splits(corpus: Path, tmp_path: Path) -> None:
    """A data set cut by rows, whose equal texts are in different tasks' shares."""
    texts = TEXTS["e.jsonl"][:40] * 2
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    made = {}
    for command in (["tokenize"], ["submit", "--tasks", "3", "--local"]):
        (tmp_path / command[0]).mkdir()
        given = small(tmp_path / command[0], corpus / "t.model", "--dataset", str(tmp_path / "saved"))
        main([*command, *given, "--split", "70,0,30", "--deduplicate"])
        made[command[0]] = {path.name: path.read_bytes() for path in (tmp_path / command[0]).iterdir()}
    assert made["submit"] == made["tokenize"]
    assert json.loads(made["submit"]["set.json"])["duplicates"] == 40


def test_all_that_is_in_the_way_is_in_one_report(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A file that cannot be read, and a fault: the tasks go on, and so does the same command."""
    texts = TEXTS["e.jsonl"]
    lines = [json.dumps({"text": text}) for text in texts]
    packed = gzip.compress("\n".join(lines).encode())
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, NO_OBJECT]))
    (tmp_path / "b.jsonl.gz").write_bytes(packed[:-2000] + bytes(2000))
    status = (tmp_path / "b.jsonl.gz").stat()
    given = small(tmp_path, corpus / "t.model", "--input", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz"))
    command = ["submit", "--tasks", "2", "--local", *given]
    said = refused(command, capsys)
    work = tmp_path / "set.sla-data"
    assert said[-3].startswith(f"sla-data: task 1 ({tmp_path}/") and f"{tmp_path}/b.jsonl.gz: " in said[-3]
    assert said[-2].startswith(f"sla-data: {tmp_path}/a.jsonl:101: not a JSON object")
    assert said[-1].endswith(
        f"set: 1 of 2 tasks are not finished; 1 documents are faults, all of them in {work}/faults: expected all: "
        "the same sla-data submit, without --overwrite, goes on with what is left"
    )
    finished = (work / "tasks" / "00000.done").stat()
    for other, message in {
        ("tokenize", *given): f"{work} is unfinished work of sla-data submit: expected that, or --overwrite",
        ("submit", "--tasks", "3", "--local", *given): f"--tasks 3: {work} was divided among 2: expected that",
        ("submit", "--tasks", "2", "--local", *given, "--no-append-eod"): "was made with append_eod = True, not False",
        ("task", str(work), "--index", "2"): "--index 2: expected 0 to 1, or --merge",
        ("task", str(tmp_path)): f"{tmp_path}: expected the folder of unfinished work that sla-data submit made",
    }.items():
        assert message in refused(list(other), capsys)[-1]
    # The disk gives what is on it: the same file, as far as its size and date tell.
    (tmp_path / "b.jsonl.gz").write_bytes(packed)
    os.utime(tmp_path / "b.jsonl.gz", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "sla-data submit --on-error skip, which goes on here" in refused(command, capsys)[-1]
    assert (work / "tasks" / "00000.done").stat() == finished
    # A shard of a finished task is lost: it is not left out, its task does it again.
    sorted((work / "tasks" / "00001.sla-data" / "shards").glob("*.json"))[1].unlink()
    main(["submit", "--tasks", "2", "--dry-run", *given])
    assert "--array" not in capsys.readouterr().out
    assert "1 of 2 tasks are not finished" in refused(["task", str(work), "--merge"], capsys)[-1]
    main([*command, "--on-error", "skip"])
    divided = contents(tmp_path / "set")
    main(["tokenize", *given, "--on-error", "skip", "--overwrite"])
    assert contents(tmp_path / "set") == divided


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tokenizer-model", "{}/a.jsonl", "--local"], "a.jsonl cannot be read: "),
        (["--input", "{}/b.jsonl", "--local"], "b.jsonl:1: not a JSON object"),
        (["--input", "{}/none.jsonl", "--local"], "none.jsonl: expected files of text"),
        (["--tasks", "0", "--local"], "--tasks 0: expected a number from 1 to 99999"),
        (["--local", "--", "--time=1"], "--time=1: options of sbatch: expected none with --local"),
        ([], "sbatch: not found: expected Slurm's commands on this machine, or --local"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    more: list[str],
    message: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "text"}))
    (tmp_path / "b.jsonl").write_text(NO_OBJECT)
    monkeypatch.setenv("PATH", str(tmp_path))
    given = small(tmp_path, corpus / "t.model", "--input", str(tmp_path / "a.jsonl"))
    said = refused(["submit", "--tasks", "2", *given, *(word.format(tmp_path) for word in more)], capsys)
    assert message in said[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_a_dry_run_says_what_would_be_submitted(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SETUP", "my modules.sh")
    command = [
        "submit",
        "--tasks",
        "3",
        "--limit",
        "2",
        "--workers",
        "4",
        "--dry-run",
        *flags(corpus, tmp_path / "set"),
    ]
    main([*command, "--", "--partition=cpu"])
    array, merge = map(shlex.split, capsys.readouterr().out.splitlines())
    for words in (array, merge):
        assert words[0] == "sbatch" and {"--partition=cpu", "SETUP=my modules.sh", f"{tmp_path}/set.sla-data"} <= {
            *words
        }
    assert {"--array=0-2%2", "--cpus-per-task=4", "--workers=4"} <= {*array}
    assert {"--dependency=afterany:ARRAY", "--merge", "--on-error=fatal"} <= {*merge}
    assert not list(tmp_path.iterdir())


def test_the_script_runs_in_a_container_or_refuses(tmp_path: Path) -> None:
    """A stand-in for srun says what it was given."""
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": "/submitted", "SLURM_CPUS_PER_TASK": "2"}

    def run(*words: str) -> subprocess.CompletedProcess:
        command = ["bash", str(ROOT / "launch" / "data.sbatch"), *words, "/data/set.sla-data", "--workers=2"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    options = ["CONTAINER_IMAGE=a.sqsh", "CONTAINER_MOUNTS=/corpus", "CONTAINER_OPTIONS=--no-container-mount-home"]
    done = run(f"SLA_ROOT={ROOT}", *options)
    assert done.stdout.splitlines() == [
        *("--ntasks=1", "--container-image=a.sqsh", f"--container-mounts=/corpus,{ROOT},/data,/submitted"),
        *("--no-container-mount-home", "python3", "-m", "sla_megatron.commands.data.cli"),
        *("task", "/data/set.sla-data", "--workers=2"),
    ]
    for words, message in (
        ([f"SLA_ROOT={tmp_path}"], f"SLA_ROOT {tmp_path}: expected the repository's folder"),
        ([f"SLA_ROOT={ROOT}", "SETUP=/none"], "SETUP /none: expected a file that can be read"),
    ):
        done = run(*words)
        assert (done.returncode, done.stderr) == (2, f"data.sbatch: error: {message}\n")
