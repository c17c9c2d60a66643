"""``sla-data inspect``: figures are numpy's, texts the tokenizer's."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sla_megatron.commands.data import contents, histogram, inspection, inspection_report
from sla_megatron.commands.data.contents import Lengths, document_figures, empty_sequences, scan
from sla_megatron.commands.data.errors import DataError
from sla_megatron.commands.data.inspection import DTYPES, open_index
from sla_megatron.commands.data.training_tokenizer import EOS_ID

from .indexed_data import (
    TEXTS,
    Documents,
    encoded,
    faults_of,
    five_sequences,
    flags,
    lengths_of,
    random_documents,
    run,
    train_model,
    write,
)

pytestmark = pytest.mark.usefixtures("megatron_imported")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def five(tmp_path: Path) -> str:
    return five_sequences(tmp_path / "data")


def write_manifest(path: Path, model: Path, name: str, **changes: Any) -> None:
    documents = encoded(model)
    counts = {"prefix": name, "documents": len(documents), "tokens": int(lengths_of(documents).sum())}
    content = {
        "tokenizer": {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(model)},
        "append_eod": True,
        "outputs": {"train": counts | changes},
    }
    path.write_text(json.dumps(content))


# Figures


def test_the_types_are_megatrons() -> None:
    from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType

    assert {one.value: one.name for one in DType} == DTYPES
    assert inspection.MAGIC == _INDEX_HEADER


SEQUENCE = st.lists(st.integers(0, 300), max_size=9)
DOCUMENTS = st.lists(st.lists(SEQUENCE, max_size=4), min_size=1, max_size=30).filter(lambda d: lengths_of(d).sum() > 0)


@settings(max_examples=60)
@given(documents=DOCUMENTS, wide=st.booleans(), entries=st.integers(1, 8), tokens=st.integers(1, 8))
def test_figures(
    documents: Documents, wide: bool, entries: int, tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In pieces of any size; documents may have no sequence, and sequences no token."""
    dtype = numpy.int32 if wide else numpy.uint16
    prefix = write(tmp_path_factory.mktemp("figures") / "data", documents, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "ENTRIES", entries)
        patch.setattr(contents, "DOCUMENTS", entries)
        patch.setattr(contents, "CHUNK_BYTES", tokens * numpy.dtype(dtype).itemsize)
        index = open_index(prefix)
        assert faults_of(prefix) == []
        figures, empty, ids = document_figures(index, eod=7), empty_sequences(index), scan(index, 301)

    sequences = [sequence for document in documents for sequence in document]
    flat = numpy.array([token for sequence in sequences for token in sequence])
    assert (index.documents, index.sequences, index.tokens) == (len(documents), len(sequences), flat.size)
    check_lengths(figures.lengths, lengths_of(documents))
    last = [next((s[-1] for s in reversed(document) if s), None) for document in documents]
    assert figures.ended == last.count(7)
    assert figures.not_ended == next((i for i, token in enumerate(last) if token not in (7, None)), None)
    nothing = [i for i, sequence in enumerate(sequences) if not sequence]
    assert (empty.count, empty.first) == (len(nothing), nothing[0] if nothing else None)
    assert (ids.least, ids.greatest, ids.different) == (flat.min(), flat.max(), numpy.unique(flat).size)
    assert ids.fault is None


def check_lengths(found: Lengths, expected: numpy.ndarray) -> None:
    assert found.documents == expected.size
    assert found.mean == pytest.approx(expected.mean())
    for percent in (0, 5, 25, 50, 75, 95, 99, 100):
        assert found.percentile(percent) == numpy.percentile(expected, percent, method="inverted_cdf")
    bins = histogram.histogram(found)
    assert sum(one.documents for one in bins) == expected.size
    assert sum(one.tokens for one in bins) == expected.sum()
    for one in bins:
        assert one.documents == ((expected >= one.least) & (expected <= one.greatest)).sum()
    assert bins[0].least <= expected.min() and expected.max() <= bins[-1].greatest


def test_bins_at_powers_of_two() -> None:
    values = numpy.array([0, 1, 2, 3, 4, 7, 8, 2**31, 2**40 - 1])
    bins = histogram.histogram(Lengths(values, numpy.arange(1, 10)))
    assert [(one.label, one.documents) for one in bins[:5]] == [
        ("0", 1),
        ("1", 2),
        ("2-3", 7),
        ("4-7", 11),
        ("8-15", 7),
    ]
    assert [one.documents for one in bins if one.documents][5:] == [8, 9]
    lines = histogram.as_text(bins)
    assert len(lines) == len(bins) + 1
    # What is there is seen, what is not is not.
    assert [("#" in line) for line in lines[1:]] == [one.documents > 0 for one in bins]


def test_report(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = encoded(model)
    prefix = write(tmp_path / "data", documents)
    assert run(prefix, *flags(model), "--documents", 4) == 0
    printed = capsys.readouterr().out
    lengths = lengths_of(documents)
    assert printed.startswith(f"{prefix}\n  documents          4\n  sequences          4\n")
    assert f"tokens             {lengths.sum():,} (uint16, {2 * lengths.sum():,} bytes)" in printed
    assert f"SentencePieceTokenizer {model}, 400 tokens\n" in printed
    assert f"4 of 4 documents end with token {EOS_ID}\n" in printed
    assert printed.endswith("  sound: the index and all tokens were checked\n")


# Texts


def test_documents_are_decoded(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "data", encoded(model))
    run(prefix, *flags(model), "--documents", 4, "--characters", 100)
    printed = capsys.readouterr().out
    assert "    Hello, World!\n      two lines\n" in printed
    assert "    naïve café 中文 😀😀😀\n" in printed
    # Nothing reaches the terminal that would steer it.
    assert "    \\x1b[31mred\\x1b[0m\\ttab\n" in printed
    assert f"    {'x' * 100} ...\n" in printed


@pytest.mark.parametrize("characters", [0, 1, 13, 14, 15, 16, 17])
def test_texts_are_cut_at_characters(
    characters: int, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where a character is several tokens."""
    text = TEXTS[1]
    prefix = write(tmp_path / "data", encoded(model, [text]))
    run(prefix, *flags(model), "--characters", characters)
    shown = text if characters >= len(text) else f"{text[:characters]} ..."
    assert f"tokens\n    {shown.strip()}\n" in capsys.readouterr().out.replace("     ...", "    ...")


def test_several_sequences_are_one_text(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [
        [sequence[:1], [], sequence[1:5], sequence[5:]] for (sequence,) in encoded(model, [TEXTS[0], TEXTS[3]])
    ]
    assert run(write(tmp_path / "data", documents), *flags(model), "--characters", 40) == 0
    printed = capsys.readouterr().out
    assert "sequences          8, 2 of them empty, the first is 1\n" in printed
    assert (
        f"document 0: {lengths_of(documents)[0]} tokens in 4 sequences\n    Hello, World!\n      two lines\n" in printed
    )
    assert f"    {'x' * 40} ...\n" in printed


def test_ids_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "data", [[[5, 70000], [6]], [], [[]], [list(range(500))]], numpy.int32)
    assert run(prefix, "--documents", 9, "--characters", 9) == 0
    printed = capsys.readouterr().out
    assert "tokenizer          not known" in printed and "end of document" not in printed
    assert "document 0: 3 tokens in 2 sequences\n    5 70000 6\n" in printed
    assert "document 3: 500 tokens\n    0 1 2 3 4 ...\n" in printed
    assert "token ids          0 to 70,000, 501 different ones\n" in printed


def test_hugging_face_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Byte-level tokens are joined as the library itself joins them."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    library = ByteLevelBPETokenizer()
    library.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=library._tokenizer, eos_token="<|end|>").save_pretrained(tmp_path / "hf")
    documents = [[[*library.encode(text).ids, 0]] for text in TEXTS]
    prefix = write(tmp_path / "data", documents)
    assert run(prefix, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "hf") == 0
    printed = capsys.readouterr().out
    assert "    naïve café 中文 😀😀😀<|end|>\n" in printed
    assert "4 of 4 documents end with token 0\n" in printed


# The manifest


@pytest.mark.parametrize(("name", "manifest"), [("corpus", "corpus"), ("corpus_train", "corpus"), ("a.b", "a.b")])
def test_the_manifest_names_the_tokenizer(
    name: str, manifest: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write(tmp_path / name, encoded(model))
    write_manifest(tmp_path / f"{manifest}.json", model, name)
    assert run(prefix) == 0
    printed = capsys.readouterr().out
    assert f"400 tokens (from {tmp_path / manifest}.json)\n" in printed
    assert "    naïve café 中文 😀😀😀\n" in printed


@pytest.mark.parametrize("counted", ["documents", "tokens"])
def test_the_manifest_counts_something_else(
    counted: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write(tmp_path / "data", encoded(model))
    write_manifest(tmp_path / "data.json", model, "data", **{counted: 9})
    assert run(prefix) == 1
    assert f"wrong: {tmp_path / 'data.json'}: 9 {counted}, the data have" in capsys.readouterr().out


def test_a_document_without_its_end(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = encoded(model)
    documents[2][0][-1] = 9
    prefix = write(tmp_path / "data", documents)
    # Without a manifest nobody says that there has to be one.
    assert run(prefix, *flags(model)) == 0
    assert "3 of 4 documents end with token 2; the first that does not is 2\n" in capsys.readouterr().out
    write_manifest(tmp_path / "data.json", model, "data")
    assert run(prefix) == 1
    assert "every document ends with the end-of-document token, document 2 does not" in capsys.readouterr().out
    assert run(prefix, "--no-scan") == 0
    assert "sound: the index was checked\n" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[1]", '{"text": "a"}', '{"text": "a"}\n{"text": "b"}\n', "\xff", "{}"])
def test_a_corpus_is_no_manifest(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "data", random_documents())
    (tmp_path / "data.json").write_bytes(content.encode("latin-1"))
    assert run(prefix, "--documents", 0) == 0
    assert "tokenizer          not known: --tokenizer-type" in capsys.readouterr().out


def test_another_corpus_s_manifest(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "corpus_train", random_documents())
    write_manifest(tmp_path / "corpus.json", model, "corpus")
    assert run(prefix, "--documents", 0) == 0
    assert "not known" in capsys.readouterr().out


def test_the_manifest_s_tokenizer_is_gone(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "data", encoded(model))
    content = {"tokenizer": {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "gone"}, "outputs": {}}
    (tmp_path / "data.json").write_text(json.dumps(content))
    assert run(prefix, "--documents", 1) == 0
    assert f"not known: {tmp_path / 'data.json'}: SentencePieceTokenizer gone cannot be read" in capsys.readouterr().out
    # Flags say where it is now.
    assert run(prefix, *flags(model), "--documents", 1) == 0
    assert "    Hello, World!\n" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--documents", "--characters"])
@pytest.mark.parametrize("value", ["-1", "x", "1.5"])
def test_counts(flag: str, value: str, five: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(five, f"{flag}={value}")
    assert stopped.value.code == 2
    assert f"argument {flag}: {value}: expected a whole number, 0 or more" in capsys.readouterr().err


# The picture


def test_plot(five: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, file = write(tmp_path / "other", random_documents()), tmp_path / "lengths.png"
    before = set(tmp_path.iterdir())
    assert run(five, other, "--documents", 0, "--plot", file) == 0
    assert file.read_bytes().startswith(b"\x89PNG\r\n")
    assert set(tmp_path.iterdir()) == before | {file}
    assert capsys.readouterr().out.endswith(f"{file}: written\n")
    written = file.stat().st_mtime_ns
    with pytest.raises(DataError, match="expected a new file, or --overwrite beside it"):
        run(five, "--plot", file)
    assert file.stat().st_mtime_ns == written
    assert run(five, "--documents", 0, "--plot", file, "--overwrite") == 0
    assert file.stat().st_mtime_ns > written


def test_plot_where_it_cannot_be(five: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="a file name that ends in .png"):
        run(five, "--plot", tmp_path / "lengths.svg")
    with pytest.raises(DataError, match="a file in a directory that exists"):
        run(five, "--plot", tmp_path / "gone" / "lengths.png")
    monkeypatch.setattr("sla_megatron.common.figures.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"--plot .*lengths.png: expected matplotlib to be installed: pip install"):
        run(five, "--plot", tmp_path / "lengths.png")


def test_a_plot_that_fails_leaves_no_file(five: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def fail(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).touch()
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    before = set(tmp_path.iterdir())
    with pytest.raises(DataError, match="lengths.png: cannot be written: no space left"):
        run(five, "--documents", 0, "--plot", tmp_path / "lengths.png")
    assert set(tmp_path.iterdir()) == before


# Large data


def test_progress_of_a_long_scan(
    five: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(five, "--documents", 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(inspection_report, "_PATIENCE", 40)
    run(five, "--documents", 0, *flags(model))
    shown = capsys.readouterr().err
    assert "ends of documents: 100%" in shown and "token ids: 100%" in shown


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """64 MB of tokens and 16 MB of index in less than 16 MB of the process's own; what is mapped is the kernel's."""
    import tracemalloc

    length, count = 32, 1 << 20
    numpy.zeros(length * count, numpy.uint16).tofile(tmp_path / "data.bin")
    with open(tmp_path / "data.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", inspection.MAGIC, 1, 8, count, count + 1))
        numpy.full(count, length, numpy.int32).tofile(file)
        (numpy.arange(count) * 2 * length).tofile(file)
        numpy.arange(count + 1).tofile(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "ENTRIES", 1 << 16)
        patch.setattr(contents, "CHUNK_BYTES", 1 << 20)
        tracemalloc.start()
        try:
            index = open_index(str(tmp_path / "data"))
            assert faults_of(index.prefix) == []
            assert document_figures(index, eod=0).ended == count
            assert scan(index, 1).different == 1
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 16e6
