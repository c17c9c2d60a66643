"""The quickstart's text, tokenizer and data set."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from examples.quickstart import build_dataset, corpus, prose
from sla_megatron.commands.data import tokenizing
from sla_megatron.commands.data.training_tokenizer import EOS_ID, PAD_ID
from sla_megatron.common.silence import without_announcements


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small stand-in for a standard library: 30 sources, and files that must not be read."""
    root = tmp_path / "lib"
    for i in range(30):
        folder = root / ("pkg" if i % 2 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        body = "".join(f"def function_{i}_{j}(value):\n    return value + {j}\n\n" for j in range(40))
        (folder / f"module_{i}.py").write_text(f'"""Module {i}: naïve, façade, 数."""\n\n{body}')
    for name in ("test/test_x.py", "pkg/idlelib/gui.py", "site-packages/other.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("left_out = True\n" * 200)
    (root / "tiny.py").write_text("left_out = 1\n")
    (root / "latin1.py").write_bytes(b"# left_out caf\xe9\n" * 200)
    (root / "mark.py").write_text("# left_out \u2581\n" * 200)
    return root


# Text


def test_corpus_reads_only_library_sources_in_a_fixed_order(library: Path) -> None:
    documents = corpus.read_documents(10**7, library)
    assert len(documents) == 30 and not any("left_out" in text for text in documents)
    assert documents == corpus.read_documents(10**7, library)
    names = [path.name for path in corpus.find_sources(library) if path.name.startswith("module")]
    assert names != sorted(names)  # --split by position must not hold out the end of the alphabet


def test_corpus_limit_is_a_prefix_of_the_whole(library: Path) -> None:
    whole = corpus.read_documents(10**7, library)
    limit = sum(len(text.encode()) for text in whole[:25]) + 10
    assert corpus.read_documents(limit, library) == whole[:25]


def test_corpus_too_small(library: Path) -> None:
    with pytest.raises(corpus.CorpusError, match="only 0 readable source files"):
        corpus.read_documents(100, library)


def test_corpus_of_this_python() -> None:
    documents = corpus.read_documents(10**6)
    assert documents == corpus.read_documents(10**6)
    assert 5 * 10**5 < sum(len(text.encode()) for text in documents) <= 10**6


def test_fingerprint_sees_text_order_and_boundaries() -> None:
    prints = [corpus.fingerprint(documents) for documents in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"])]
    assert len(set(prints)) == 4 and corpus.fingerprint(["ab", "c"]) == prints[0]


def test_order_is_that_of_names_below_the_root(tmp_path: Path) -> None:
    """Wherever the text is, and however it is listed."""
    names = [f"pkg/module_{i}.py" for i in range(20)]
    here, there = ([root / name for name in names] for root in (tmp_path / "here", tmp_path / "there"))
    found = [path.name for path in corpus.shuffled(here, tmp_path / "here")]
    assert found == [path.name for path in corpus.shuffled(reversed(there), tmp_path / "there")]
    assert found != sorted(found) and sorted(found) == sorted(path.name for path in here)


# Data set


def test_dataset_reads_back_as_the_token_ids(library: Path, tmp_path: Path) -> None:
    dataset = build_dataset.build(tmp_path / "data", 10**7, 512, say=lambda line: None, root=library)
    with without_announcements():
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.tokenizers import MegatronTokenizer

    indexed = IndexedDataset(str(dataset.prefix))
    metadata = {"library": "sentencepiece"}
    tokenizer = MegatronTokenizer.from_pretrained(str(dataset.tokenizer_model), metadata_path=metadata)
    documents = corpus.read_documents(10**7, library)
    assert len(indexed) == len(documents) == dataset.documents
    assert indexed.document_indices.tolist() == list(range(len(documents) + 1))
    for ids, text in zip(indexed, documents, strict=True):
        assert ids.tolist() == [*tokenizer.tokenize(text), tokenizer.eod]
    assert sum(len(ids) for ids in indexed) == dataset.tokens
    assert tokenizer.vocab_size == dataset.vocab_size == 512
    assert (tokenizer.eod, tokenizer.pad) == (EOS_ID, PAD_ID)
    assert indexed[0].dtype == numpy.uint16


def test_finished_dataset_is_used_again(library: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = build_dataset.build(tmp_path / "data", 10**7, 512, say=said.append, root=library)
    before = {path.name: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    made = {"corpus.jsonl", "tokenizer.model", "corpus.bin", "corpus.idx", "corpus.json", build_dataset.MANIFEST}
    assert set(before) == made
    assert build_dataset.build(tmp_path / "data", 10**7, 512, say=said.append, root=library) == first
    assert said[-1] == f"using the data set in {tmp_path / 'data'}"
    assert {path.name: path.stat().st_mtime_ns for path in first.directory.iterdir()} == before


def test_nothing_else_is_overwritten(library: Path, tmp_path: Path) -> None:
    build_dataset.build(tmp_path / "data", 10**7, 512, say=lambda line: None, root=library)
    with pytest.raises(build_dataset.DatasetError, match="other text or settings"):
        build_dataset.build(tmp_path / "data", 10**7, 600, say=lambda line: None, root=library)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(build_dataset.DatasetError, match="not a data set of the quickstart"):
        build_dataset.build(tmp_path / "mine", 10**7, 512, say=lambda line: None, root=library)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_interrupted_build_goes_on(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    data, said = tmp_path / "out" / "data", []
    with monkeypatch.context() as patched:
        patched.setattr(tokenizing, "tokenize", interrupted)
        with pytest.raises(SystemExit, match="130"):
            build_dataset.build(data, 10**7, 512, say=lambda line: None, root=library)
    assert "tokens" not in build_dataset.load_manifest(data)
    model = (data / "tokenizer.model").stat()
    with pytest.raises(build_dataset.DatasetError, match="other text or settings"):
        build_dataset.build(data, 10**7, 600, say=lambda line: None, root=library)
    dataset = build_dataset.build(data, 10**7, 512, say=said.append, root=library)
    assert dataset.documents == 30 and (data / "tokenizer.model").stat() == model
    assert [line.split()[2] for line in said if line.startswith("$ sla-data")] == ["tokenize"]
    again = build_dataset.build(tmp_path / "again", 10**7, 512, say=said.append, root=library)
    for name in ("tokenizer.model", "corpus.bin", "corpus.idx", build_dataset.MANIFEST):
        assert (data / name).read_bytes() == (again.directory / name).read_bytes()


def test_text_is_written_as_a_whole(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_dataset, "flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_dataset.build(tmp_path / "out" / "data", 10**7, 512, say=lambda line: None, root=library)
    assert list((tmp_path / "out").iterdir()) == []


def test_too_large_a_vocabulary(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_dataset.build(tmp_path / "data", 10**7, 32_000, say=lambda line: None, root=library)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sla-data: error: --vocab-size 32000: expected at most ")


def test_environment_is_left_alone(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training comes after it in the same process, and needs the GPUs that sla-data hides from itself."""
    for name in ("CUDA_VISIBLE_DEVICES", "RANK"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    build_dataset.build(tmp_path / "data", 10**7, 512, say=lambda line: None, root=library)
    assert dict(os.environ) == before


def test_build_after_a_killed_one(library: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".data.partial"
    stale.mkdir()
    (stale / "corpus.bin").write_bytes(b"half")
    (stale / "unknown").write_bytes(b"of a killed build")
    dataset = build_dataset.build(tmp_path / "data", 10**7, 512, say=lambda line: None, root=library)
    assert not stale.exists() and not (dataset.directory / "unknown").exists()


# The command


@pytest.fixture
def command(library: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """build_dataset's, whose texts are the stand-in's, and say which is read."""
    for name, (said, _) in build_dataset.TEXTS.items():
        text = (said, lambda max_bytes, root: corpus.read_documents(max_bytes, library))
        monkeypatch.setitem(build_dataset.TEXTS, name, text)
    return lambda *argv: build_dataset.main([str(word) for word in argv])


@pytest.mark.parametrize(
    ("text", "said"),
    [("code", "Python's own sources"), ("prose", "the prose of packages' docstrings")],
    ids=["code", "prose"],
)
def test_command_makes_either_text(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    """With its counts in the last line; nothing is made twice."""
    words = (tmp_path / "data", "--text", text, "--vocab-size", 512)
    for _ in range(2):
        command(*words)
        lines = capsys.readouterr().out.splitlines()
        manifest = build_dataset.load_manifest(tmp_path / "data")
        assert lines[0] == f"reading {said}, up to 8 MB"
        assert lines[-1] == f"30 documents, {manifest['tokens']:,} tokens in {tmp_path / 'data'}"
    assert lines[-2] == f"using the data set in {tmp_path / 'data'}"


def test_each_text_has_its_reader() -> None:
    readers = {name: read for name, (_, read) in build_dataset.TEXTS.items()}
    assert readers == {"code": corpus.read_documents, "prose": prose.read_documents}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: DIR"),
        (["data", "--text", "verse"], "--text verse: expected one of code, prose"),
        (["data", "--corpus-mb", "0.5"], "--corpus-mb 0.5: expected a number of megabytes, 1 or more"),
        (["data", "--vocab-size", "100"], "--vocab-size 100: expected an integer of 512 or more"),
        (["data", "--txt", "code"], "--txt code: expected a known flag, such as --text"),
    ],
    ids=["no_folder", "text", "corpus_mb", "vocab_size", "unknown"],
)
def test_bad_flags_of_the_command(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        build_dataset.main(words)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.endswith(f" error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_command_leaves_others_files_alone(command: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("keep")
    with pytest.raises(SystemExit, match="^build_dataset: error: .* is not a data set of the quickstart"):
        command(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "lib"] == ["thesis.txt"]
