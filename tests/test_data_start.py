"""sla-data speaks before it imports, imports what its tokenizer needs, and starts workers where there is work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sla_megatron.commands.data import workers
from sla_megatron.commands.data.cli import main
from tests.support.launch import ROOT
from tests.support.tokenizers import hugging_face_folder, train_sentencepiece

#: Importing one of these takes a tenth of a second or more.
HEAVY = {"torch", "megatron", "transformers", "tokenizers", "datasets", "matplotlib", "pyarrow"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of three shards of 50 bytes, tokenizers, and a data set."""
    folder = tmp_path_factory.mktemp("start")
    train_sentencepiece(folder / "t.model", eos_id=2, pad_id=3)
    hugging_face_folder(folder / "hf")
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": f"{i} " + "word " * 15}) + "\n" for i in range(3)))
    main(tokenize(folder, "SentencePieceTokenizer", "t.model", "set"))
    return folder


def tokenize(folder: Path, kind: str, model: str, out: str, *more: str) -> list[str]:
    given = ["tokenize", "--input", str(folder / "c.jsonl"), "--output-prefix", str(folder / out)]
    return [*given, "--tokenizer-type", kind, "--tokenizer-model", str(folder / model), *more]


def imported(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What the command and all of its processes wrote to stderr, and the packages that they imported by it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "sla_megatron.commands.data.cli", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = done.stderr.splitlines()
    assert done.returncode == 0, said[-5:]
    return said, [line.rpartition("|")[2].split(".")[0].strip() for line in said if line.startswith("import time:")]


SENTENCEPIECE, HUGGING_FACE = ("SentencePieceTokenizer", "t.model"), ("HuggingFaceTokenizer", "hf")


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        (lambda f: tokenize(f, *SENTENCEPIECE, "one"), set()),
        (lambda f: tokenize(f, *SENTENCEPIECE, "two", "--workers", "2", "--shard-mb", "0.00005"), set()),
        (
            lambda f: tokenize(f, *HUGGING_FACE, "hf2", "--workers", "2", "--shard-mb", "0.00005"),
            # transformers imports torch.
            {"transformers", "tokenizers", "torch"},
        ),
        (lambda f: ["submit", "--tasks", "2", "--local", *tokenize(f, *SENTENCEPIECE, "divided")[1:]], set()),
        (lambda f: ["inspect", str(f / "set")], set()),
        (lambda f: ["merge", str(f / "set"), str(f / "set"), "--output-prefix", str(f / "merged")], set()),
        (
            lambda f: ["tokenizer", "--input", str(f / "c.jsonl"), "--output", str(f / "m"), "--vocab-size", "275"],
            set(),
        ),
    ],
    ids=["sentencepiece", "sentencepiece-workers", "hugging-face-workers", "submit", "inspect", "merge", "tokenizer"],
)
def test_imports(folder: Path, command: Callable[[Path], list[str]], needed: set[str]) -> None:
    """Of the command itself, of the server of its workers, and of these; a word comes before what is heavy."""
    said, packages = imported(command(folder))
    assert {"argparse", "sla_megatron"} <= set(packages), "nothing was measured"
    assert set(packages) & HEAVY == needed
    if needed:
        first = ["sla-data: loading the tokenizer" in line for line in said].index(True)
        assert first < min(at for at, line in enumerate(said) if line.endswith(" torch"))
        # The server of the workers does: neither the command nor any worker.
        assert sum(line.split()[-1] == "torch" for line in said) == 1


@pytest.mark.parametrize(("shard_mb", "most", "started"), [("1", 16, 1), ("0.00005", 16, 3), ("0.00005", 2, 2)])
def test_workers_start_for_work(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    shard_mb: str,
    most: int,
    started: int,
) -> None:
    """One for one shard, whatever --workers says; never more than that."""
    processes = []

    class Counted(workers._Worker):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            processes.append(self.process.pid)

    monkeypatch.setattr(workers, "_Worker", Counted)
    main(tokenize(folder, *SENTENCEPIECE, f"{shard_mb}-{most}", "--shard-mb", shard_mb, "--workers", str(most)))
    assert len(processes) == started
    assert f"{started} of {most} workers]" in capsys.readouterr().err


def test_a_tokenizer_that_no_worker_can_build(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As with one worker: a line, and nothing is written."""
    (tmp_path / "bad.model").write_bytes(b"no model")
    lines = []
    for number in ("1", "2"):
        given = tokenize(folder, "SentencePieceTokenizer", str(tmp_path / "bad.model"), str(tmp_path / "out"))
        with pytest.raises(SystemExit) as ended:
            main([*given, "--workers", number])
        assert ended.value.code == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["bad.model"]
        lines.append(capsys.readouterr().err.splitlines()[-1])
    assert lines[0] == lines[1] and lines[0].startswith(
        f"sla-data: error: SentencePieceTokenizer {tmp_path}/bad.model cannot be read: "
    )


@pytest.fixture
def heard() -> Iterator[None]:
    """Control-C is heard by what a test starts, even where a shell started the tests in the background, deaf to it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("heard")
def test_control_c_while_the_server_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the command once the server, which is started deaf to it, is there."""

    def start() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        server = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"]
        assert subprocess.run(server, capture_output=True).returncode == 0
        started.append(True)

    started: list[bool] = []
    monkeypatch.setattr(workers.forkserver, "ensure_running", start)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with pytest.raises(KeyboardInterrupt):
        workers.begin_preloading()
    assert started == [True]


@pytest.mark.usefixtures("heard")
def test_control_c_while_workers_start(folder: Path) -> None:
    """It reaches all processes of the terminal; the command alone says something."""
    # On a busy machine workers may have begun by the time that the signal comes; they are not to have finished.
    corpus = folder / "long.jsonl"
    corpus.write_text((json.dumps({"text": "word " * 1000}) + "\n") * 10_000)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "sla_megatron.commands.data.cli"),
            *tokenize(folder, *HUGGING_FACE, "interrupted", "--workers", "2", "--input", str(corpus)),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    loading = "sla-data: loading the tokenizer, "
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if [each.startswith(loading) for each in said].count(True) == 2:
            break
    os.killpg(process.pid, signal.SIGINT)  # The server has begun to import.
    said += process.communicate(timeout=60)[1].splitlines(keepends=True)
    assert process.returncode == 130 and said[-1] == "sla-data: interrupted\n", said
    # A busy machine takes long enough for what comes before, and after, to be said too.
    phases = ("sla-data: opening the input, ", "sla-data: looking at the files, ", loading, "tokenizing: ")
    assert all(line.startswith(phases) for line in said[:-1]), said
