"""The quickstart's text, tokenizer and data set."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import sentencepiece

from examples.quickstart import build_dataset, corpus


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


# Tokenizer and data set

UNUSUAL = [
    "",
    "plain",
    "  two  spaces  ",
    "\ttabs\tand\n\n\nnewlines\r\n",
    "def f(x):\n        return {'a': x}\n",
    "é e\u0301 ﬁ Ａ ½",  # nothing is normalised
    "数字 עברית 🏳️‍🌈 𝔘",
    "\u0000\u000b\u2028\ufeff\u00a0",
    "<s> </s> <unk> <pad> <0x0A>",  # spelled out, not control tokens
]


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    model = build_dataset.train_tokenizer(corpus.read_documents(10**6), 1024)
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.mark.parametrize("text", UNUSUAL, ids=range(len(UNUSUAL)))
def test_tokenizer_round_trip(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {build_dataset.UNK_ID, build_dataset.BOS_ID, build_dataset.EOS_ID, build_dataset.PAD_ID} & set(ids)


def test_tokenizer_is_deterministic() -> None:
    documents = corpus.read_documents(10**6)
    assert build_dataset.train_tokenizer(documents, 600) == build_dataset.train_tokenizer(documents, 600)


def test_dataset_reads_back_as_the_token_ids(library: Path, tmp_path: Path) -> None:
    dataset = build_dataset.build(tmp_path / "data", 10**7, 512, say=lambda line: None, root=library)
    with build_dataset.quiet():
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
    assert (tokenizer.eod, tokenizer.pad) == (build_dataset.EOS_ID, build_dataset.PAD_ID)
    assert indexed[0].dtype == numpy.uint16


def test_finished_dataset_is_used_again(library: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = build_dataset.build(tmp_path / "data", 10**7, 512, say=said.append, root=library)
    before = {path.name: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    assert set(before) == {"tokenizer.model", "corpus.bin", "corpus.idx", build_dataset.MANIFEST}
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


def test_interrupted_build_leaves_nothing(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(documents: list[str], model: bytes, prefix: Path) -> int:
        prefix.with_suffix(".bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(build_dataset, "write_indexed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_dataset.build(tmp_path / "out" / "data", 10**7, 512, say=lambda line: None, root=library)
    assert list((tmp_path / "out").iterdir()) == []


def test_build_after_a_killed_one(library: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".data.partial"
    stale.mkdir()
    (stale / "corpus.bin").write_bytes(b"half")
    (stale / "unknown").write_bytes(b"of a killed build")
    dataset = build_dataset.build(tmp_path / "data", 10**7, 512, say=lambda line: None, root=library)
    assert not stale.exists() and not (dataset.directory / "unknown").exists()
