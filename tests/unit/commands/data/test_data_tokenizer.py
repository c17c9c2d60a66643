"""``sla-data tokenizer``: sample, model, file, and what is refused."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from sla_megatron.commands.data import cli, training_tokenizer
from sla_megatron.commands.data.documents import Document
from sla_megatron.commands.data.errors import DataError
from sla_megatron.commands.data.training_tokenizer import EOS_ID, PAD_ID, ModelSettings, Sample, train_model
from sla_megatron.common import files
from sla_megatron.common.tokenizers import DEFAULTS, build

SOURCES = [Path(module.__file__).read_text() for module in (cli, training_tokenizer, json, random, subprocess)]
TEXTS = [*SOURCES, "naïve café, Straße; 中文 日本語 한국어 😀\n" * 5, "a  b   c\t\td\r\n\n 0123456789" * 5]
ENCODED = [text.encode() for text in TEXTS]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(*argv: object) -> None:
    cli.main(["tokenizer", *map(str, argv)])


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The line that ``argv`` ends with, progress aside."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*argv)
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sla-data: error: ") or line.startswith("sla-data tokenizer: error: ")
    return line.split("error: ", 1)[1]


def megatron_tokenizer(model: Path, **options: Any) -> Any:
    given = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(model), **options}
    return build(Namespace(**{**DEFAULTS, **given}))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", TEXTS)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "kept.model"
    path.write_bytes(b"mine")
    return path


# Sample


def drawn(texts: list[bytes], budget: int, seed: int = 0) -> list[bytes]:
    sample = Sample(budget, seed)
    for text in texts:
        sample.add(text)
    return sample.take()


@given(st.lists(st.text(max_size=40), max_size=30), st.integers(1, 300), st.randoms(use_true_random=False))
def test_sample_depends_on_no_order_and_fills_the_budget(texts: list[str], budget: int, draw: random.Random) -> None:
    documents = [text.encode() for text in texts]
    sample = drawn(documents, budget)
    draw.shuffle(documents)
    assert drawn(documents, budget) == sample
    size, everything = sum(map(len, sample)), sum(map(len, documents))
    # The last document may be cut, and not within a character.
    assert size <= budget and size >= min(budget - 3, everything)
    for document in sample[:-1]:
        documents.remove(document)
    assert not sample or any(document.startswith(sample[-1]) for document in documents)


def test_sample_holds_no_more_than_it_says() -> None:
    sample = Sample(1000)
    for i in range(10_000):
        sample.add(b"%099d" % i)
        assert sample._held <= 1000 + 99 and len(sample._heap) <= 11
    assert sum(map(len, sample.take())) == 1000


def test_every_document_is_as_likely_as_any_other() -> None:
    """Over seeds, first and last documents, short and long ones, are drawn equally often."""
    documents = [(b"%03d" % i) * (1 + 9 * (i % 2)) for i in range(200)]
    counts = dict.fromkeys(documents, 0)
    for seed in range(400):
        for document in drawn(documents, 600, seed)[:-1]:
            counts[document] += 1
    groups = [documents[i::2][half] for i in (0, 1) for half in (slice(0, 50), slice(50, 100))]
    shares = [sum(counts[document] for document in group) / 50 / 400 for group in groups]
    # Of 200 documents about 36 are drawn; the standard deviation of each share is below 0.003.
    assert max(shares) - min(shares) < 0.02 and 0.1 < min(shares)


def test_one_document_larger_than_the_sample() -> None:
    assert drawn([b"x" * 5000], 100) == [b"x" * 100]
    assert drawn(["é".encode() * 10], 5) == ["éé".encode()]
    assert drawn(["é".encode()], 1) == [] == drawn([], 1)


# Model


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.model"
    run("--input", corpus, "--output", path, "--vocab-size", 700, "--model-type", request.param)
    return path


FRAGMENTS = [
    "\n",
    "\r\n",
    " ",
    "   ",
    "\t",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<0x0A>",
    "def f(x):",
    "e\u0301",
    "ﬁ",
    "½",
]
FRAGMENTS += ["\u0000", "\u2028", "\ufeff", "\u00a0", "\u3000", "\u2585", "\ufffd", "\uffff", "🏳️‍🌈", "𝔘", "中文", "a"]
ANY = st.lists(st.sampled_from(FRAGMENTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)).map("".join)


@pytest.mark.usefixtures("megatron_imported")
def test_text_comes_back_through_megatron(model: Path) -> None:
    tokenizer = megatron_tokenizer(model)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (700, EOS_ID, PAD_ID)

    @settings(max_examples=300)
    @given(ANY.filter(lambda text: "\u2581" not in text))
    def check(text: str) -> None:
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert all(id > PAD_ID for id in ids)

    check()
    for text in TEXTS:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.detokenize(tokenizer.tokenize("a\u2581b")) == "a b"  # What the help says.


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_model_is_deterministic(kind: str) -> None:
    settings = ModelSettings(500, kind, threads=3)
    assert train_model(ENCODED, settings) == train_model(ENCODED, settings)


def test_threads_make_no_difference_to_bpe() -> None:
    assert train_model(ENCODED, ModelSettings(500, threads=1)) == train_model(ENCODED, ModelSettings(500, threads=4))


def test_options_of_the_model(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.model"
    run("--input", corpus, "--output", path, "--vocab-size", 480, "--no-byte-fallback", "--split-digits",
        "--normalization", "nmt_nfkc", "--character-coverage", "1.0", "--user-symbols", "<|call|>", "x,y")  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(str(path))
    assert processor.encode("<|call|>x,y\n", out_type=str) == ["<|call|>", "x,y", "\n"]
    assert len(processor.encode("2024")) == 4
    assert processor.unk_id() in processor.encode("ε")
    assert processor.decode(processor.encode("ﬁ")) == "fi"
    assert not any(processor.is_byte(id) for id in range(480))


@pytest.mark.parametrize("words", [["x" * 200_000], ["é" * 100_000], [" " * 100_000], ["word "] * 50_000])
def test_long_lines_are_cut_between_characters_and_before_spaces(words: list[str]) -> None:
    line = "".join(words).encode()
    pieces = list(training_tokenizer._pieces(line))
    assert b"".join(pieces) == line and max(map(len, pieces)) <= 1 << 16
    for piece in pieces:
        piece.decode()
    if len(words) > 1:
        assert all(piece.startswith(b" ") for piece in pieces[1:])
    train_model([line, *ENCODED], ModelSettings(450))


# The command


def test_report(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = write_jsonl(tmp_path / "mark.jsonl", ["with \u2581", "without", "\u2581" * 3])
    path = tmp_path / "new" / "a b.model"
    run("--input", corpus, mark, "--output", path, "--vocab-size", 500)
    printed = capsys.readouterr().out
    assert "2 with U+2581" in printed
    size = f"{sum(len(text.encode()) for text in TEXTS) / 1e6:.1f}"
    assert f"sample: {size} of {size} MB of text, {len(TEXTS) + 3} of {len(TEXTS) + 3} documents" in printed
    assert f"--tokenizer-type SentencePieceTokenizer --tokenizer-model '{path}'" in printed
    assert [file.name for file in path.parent.iterdir()] == ["a b.model"]
    processor = sentencepiece.SentencePieceProcessor(str(path))
    texts = [*TEXTS, "with \u2581", "without", "\u2581" * 3]
    each = sum(len(text.encode()) for text in texts) / sum(len(processor.encode(text)) for text in texts)
    assert f"500 tokens, {each:.2f} bytes of text each on {size} MB of the sample" in printed


def test_sample_is_of_all_files_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [line for text in SOURCES for line in text.splitlines() if line.strip()]
    files = [
        write_jsonl(tmp_path / f"{i}.jsonl", [f"{i}: {j} {words[(i * 97 + j) % len(words)]}" for j in range(500)])
        for i in range(5)
    ]
    samples: list[list[bytes]] = []

    def train(documents: list[bytes], settings: ModelSettings) -> bytes:
        samples.append(documents)
        return train_model(documents, settings)

    monkeypatch.setattr(training_tokenizer, "train_model", train)
    flags = ["--vocab-size", 450, "--sample-mb", "0.03", "--model-type", "unigram"]
    run("--input", *files, "--output", tmp_path / "a.model", *flags)
    run("--input", *files[::-1], "--output", tmp_path / "b.model", *flags, "--shard-mb", "0.001")
    run("--input", *files, "--output", tmp_path / "c.model", *flags, "--seed", 1)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    first, second, other = samples
    assert first == second and set(first) != set(other)
    assert 29_900 < sum(map(len, first)) <= 30_000
    of_file = [sum(text.startswith(b"%d: " % i) for text in first) for i in range(5)]
    assert min(of_file) > 0.5 * max(of_file)


BAD = [
    (["--vocab-size", 100_000], r"--vocab-size 100000: expected at most \d+: the sample has no more bpe tokens"),
    (["--vocab-size", 270], r"--vocab-size 270: expected at least \d+, for the sample's characters, or a lower"),
    (["--vocab-size", 261], "--vocab-size 261: expected at least 262: control tokens, symbols, bytes and a character"),
    (["--vocab-size", 5, "--no-byte-fallback"], "--vocab-size 5: expected at least 6: control tokens, symbols and a"),
    (["--vocab-size", 0], "--vocab-size 0: expected a whole number from 1 to"),
    (["--vocab-size", 500, "--character-coverage", "0.5"], "0.5: expected a share from 0.98 to 1.0"),
    (["--vocab-size", 500, "--character-coverage", "nan"], "nan: expected a share from 0.98 to 1.0"),
    (["--vocab-size", 500, "--sample-mb", "0"], "0: expected megabytes greater than 0"),
    (["--vocab-size", 500, "--sample-mb", "-1"], "expected one value|-1: expected megabytes greater than 0"),
    (["--vocab-size", 500, "--seed", "x"], "x: expected a whole number from 0 to"),
    (["--vocab-size", 500, "--threads", "0"], "0: expected a whole number from 1 to 1024"),
    (["--vocab-size", 500, "--user-symbols", "</s>"], "--user-symbols </s>: expected others than the model's own"),
    (["--vocab-size", 500, "--user-symbols", "<0x0A>"], "--user-symbols <0x0A>: expected others than the model's own"),
    (["--vocab-size", 500, "--user-symbols", "a b"], "--user-symbols 'a b': expected characters without spaces"),
    (["--vocab-size", 500, "--user-symbols", ""], "--user-symbols '': expected characters without spaces"),
    (["--vocab-size", 500, "--field", "body"], r"corpus.jsonl:1: without the field.*or --on-error skip"),
    (["--vocab-size", 500, "--field", "body", "--on-error", "skip"], "expected documents to train on: there is none"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=lambda value: " ".join(map(str, value)).strip("-")[:40])
def test_bad_values(
    flags: list[object], message: str, corpus: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "--input", corpus, "--output", kept.parent / "new" / "a.model", *flags)
    assert pytest.RaisesExc(DataError, match=message).matches(DataError(line)), line
    refused(capsys, "--input", corpus, "--output", kept, "--overwrite", *flags)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name] and kept.read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_sizes_that_messages_name_are_accepted(kind: str) -> None:
    for size in (100_000, 270):
        with pytest.raises(DataError, match=r"expected at (most|least) \d+") as refusal:
            train_model(ENCODED, ModelSettings(size, kind))
        named = int(str(refusal.value).split("expected at ")[1].split()[1].strip(",:"))
        model = train_model(ENCODED, ModelSettings(named, kind))
        assert sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size() == named


def test_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    lines = [*good, b"", b"{broken", *good, b'{"text": ""}', b'{"text": "\xff"}', b'{"text": 1}', b"[]"]
    path = tmp_path / "faulty.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    flags = ["--input", path, "--output", tmp_path / "a.model", "--vocab-size", 500]
    for shard_mb in ("16", "0.001"):  # The fault's block is the first, or a later one.
        line = refused(capsys, *flags, "--shard-mb", shard_mb)
        assert line.startswith(f"{path}:{len(good) + 2}: not a JSON object (") and not (tmp_path / "a.model").exists()
    capsys.readouterr()
    run(*flags, "--on-error", "skip")
    printed = capsys.readouterr().out
    assert f"{2 * len(good)} of {2 * len(good)} documents" in printed
    for line in ("1 left out: no text", "1 left out: not UTF-8", "2 left out: not a JSON", "1 left out: without the"):
        assert line in printed


def test_nothing_is_overwritten(
    corpus: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--input", corpus, "--vocab-size", 500]
    with monkeypatch.context() as patched:
        patched.setattr(training_tokenizer, "read_sample", lambda *_: pytest.fail("must be told before hours of work"))
        assert (
            refused(capsys, *flags, "--output", kept)
            == f"--output {kept} exists: expected another name, or --overwrite"
        )
        assert "expected a file, such as" in refused(capsys, *flags, "--output", kept.parent, "--overwrite")
        message = f"--output {corpus}: expected another file than the input"
        assert refused(capsys, *flags, "--output", corpus, "--overwrite") == message
        assert "expected a folder that can be written to" in refused(capsys, *flags, "--output", kept / "a.model")
    run(*flags, "--output", kept, "--overwrite")
    assert sentencepiece.SentencePieceProcessor(str(kept)).get_piece_size() == 500


def test_nothing_is_overwritten_that_appeared_meanwhile(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.model"
    monkeypatch.setattr(training_tokenizer, "train_model", lambda *_: path.write_bytes(b"mine") and train_model(*_))
    assert "exists" in refused(capsys, "--input", corpus, "--vocab-size", 500, "--output", path)
    assert path.read_bytes() == b"mine"


def test_full_disk(
    corpus: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    line = refused(capsys, "--input", corpus, "--vocab-size", 500, "--output", kept, "--overwrite")
    assert line == f"--output {kept}: no space left"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name] and kept.read_bytes() == b"mine"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ended_while_training(number: signal.Signals, tmp_path: Path) -> None:
    """No output, no rest of it, and no wait for sentencepiece to finish."""
    draw = random.Random(1)
    text = " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(400_000))
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [text])
    argv = ["tokenizer", "--input", corpus, "--output", tmp_path / "a.model", "--vocab-size", 8000]
    command = [sys.executable, "-u", "-m", "sla_megatron.commands.data.cli", *map(str, argv), "--model-type", "unigram"]
    # What a shell starts in the background ignores SIGINT, and so would its children.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        assert process.stdout.readline().startswith("training a unigram model of 8,000 tokens on ")
        time.sleep(0.5)
        process.send_signal(number)
        started = time.monotonic()
        errors = process.communicate()[1]
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert time.monotonic() - started < 10
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_documents_are_read_once_and_not_kept(corpus: Path) -> None:
    """Of a large input, what the sample leaves is forgotten at once."""
    from sla_megatron.commands.data.inputs import Inputs
    from sla_megatron.commands.data.sources import TextFile

    class Forgetful(Sample):
        def add(self, encoded: bytes) -> None:
            super().add(encoded)
            assert self._held <= self.budget + max(map(len, ENCODED))

    inputs = Inputs([TextFile(corpus, "jsonl")], "text", 1000, 10**6)
    read = training_tokenizer.read_sample(inputs, Forgetful(5000), fatal=True)
    documents = [d for block in inputs.blocks() for d in inputs.documents(block) if isinstance(d, Document)]
    assert (read.documents, read.text_bytes) == (len(documents), sum(len(d.encoded) for d in documents))
