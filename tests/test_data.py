"""sla-data on real files: Megatron's own data set reads every document back, and faults are reported."""

from __future__ import annotations

import gzip
import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest

from sla_megatron.commands.data.cli import main
from sla_megatron.common.tokenizers import DEFAULTS, build
from tests.support.tokenizers import hugging_face_folder, tiktoken_file, train_sentencepiece

TEXTS = [f"Document {i}: {'naïve Straße 中文 😀 def f(x):'[: i % 30]}{' word' * (i * 7 % 23)}" for i in range(80)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, texts: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(len(texts))}), path, row_group_size=9)


def as_folder(folder: Path) -> None:
    folder.mkdir()
    write_parquet(folder / "train-0.parquet", TEXTS)


#: How the corpus is written, and the flags that read it.
FORMATS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "c.jsonl": (lambda p: p.write_bytes(lines(TEXTS)), ["--input", "{}"]),
    "c.jsonl.gz": (lambda p: p.write_bytes(gzip.compress(lines(TEXTS))), ["--input", "{}"]),
    "c.jsonl.zst": (lambda p: p.write_bytes(pyarrow.compress(lines(TEXTS), "zstd", asbytes=True)), ["--input", "{}"]),
    "c.txt": (lambda p: p.write_text("\n".join(TEXTS)), ["--input", "{}"]),
    "c.parquet": (lambda p: write_parquet(p, TEXTS), ["--input", "{}"]),
    "saved": (lambda p: datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(p), ["--dataset", "{}"]),
    "mapped": (as_folder, ["--dataset", "{}"]),
    "streamed": (as_folder, ["--dataset", "{}", "--streaming"]),
}

TOKENIZERS: dict[str, Callable[[Path], Namespace]] = {
    "sentencepiece": lambda folder: Namespace(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(
            train_sentencepiece(folder / "t.model", model_type="bpe", byte_fallback=True, eos_id=2, pad_id=3)
        ),
    ),
    "hugging_face": lambda folder: Namespace(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(hugging_face_folder(folder / "hf"))
    ),
    "tiktoken": lambda folder: tiktoken_file(folder / "tik.json"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Namespace:
    return TOKENIZERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Namespace:
    return TOKENIZERS["sentencepiece"](tmp_path_factory.mktemp("sentencepiece"))


def flags_of(tokenizer: Namespace) -> list[str]:
    return [part for name, value in vars(tokenizer).items() for part in ("--" + name.replace("_", "-"), str(value))]


def ids_of(tokenizer: Namespace, texts: list[str]) -> list[list[int]]:
    """What Megatron's tokenizer gives, a document end after each."""
    megatrons = build(Namespace(**{**DEFAULTS, **vars(tokenizer)}))
    return [[*megatrons.tokenize(text), megatrons.eod] for text in texts]


def documents(prefix: Path) -> list[list[int]]:
    """What Megatron's indexed data set reads."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(prefix))
    assert len(data.document_indices) == len(data) + 1
    return [data[i].tolist() for i in range(len(data))]


def sampled(prefix: Path, tokenizer: Namespace, sequence_length: int) -> tuple[list[int], list[int]]:
    """One epoch of Megatron's GPTDataset put back in order: its tokens, and the documents it took them from.

    Samples overlap by a token.  Less than a sample is left out at the end.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    data = IndexedDataset(str(prefix))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        split="1",
        tokenizer=build(Namespace(**{**DEFAULTS, **vars(tokenizer)})),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        allow_ambiguous_pad_tokens=True,
        mid_level_dataset_surplus=0.0,
    )
    indices = numpy.arange(len(data), dtype=numpy.int32)
    samples = GPTDataset(data, str(prefix), indices, None, Split.train, config)
    ordered = [samples[int(place)] for place in numpy.argsort(samples.shuffle_index)]
    stream = [token for sample in ordered for token in sample["tokens"].tolist()]
    return [*stream, int(ordered[-1]["labels"][-1])], samples.document_index.tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_megatron_reads_every_document_back(name: str, tokenizer: Namespace, tmp_path: Path) -> None:
    write, flags = FORMATS[name]
    write(tmp_path / name)
    prefix = tmp_path / "out" / "corpus"
    flags = [flag.replace("{}", str(tmp_path / name)) for flag in flags]
    main(["tokenize", *flags, "--output-prefix", str(prefix), *flags_of(tokenizer), "--shard-mb", "0.001"])
    expected = ids_of(tokenizer, TEXTS)
    assert documents(prefix) == expected
    # Samples of one token leave nothing out; longer ones are what training takes.
    sequence_length = 1 if name == "c.jsonl" else 8
    stream, order = sampled(prefix, tokenizer, sequence_length)
    assert sorted(order) == list(range(len(TEXTS)))
    whole = [token for document in order for token in expected[document]]
    assert len(whole) - sequence_length < len(stream) <= len(whole)
    assert stream == whole[: len(stream)]
    assert sorted(p.name for p in prefix.parent.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]
    manifest = json.loads(prefix.with_suffix(".json").read_text())
    assert manifest["tokens"] == sum(map(len, expected))
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_the_files_are_what_megatrons_builder_makes(sentencepiece: Namespace, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    (tmp_path / "c.jsonl").write_bytes(lines(TEXTS))
    builder = IndexedDatasetBuilder(str(tmp_path / "b.bin"), dtype=numpy.uint16)
    for ids in ids_of(sentencepiece, TEXTS):
        builder.add_document(numpy.array(ids), [len(ids)])
    builder.finalize(str(tmp_path / "b.idx"))
    flags = ["tokenize", "--input", str(tmp_path / "c.jsonl"), *flags_of(sentencepiece)]
    for shard_mb in ("0.001", "1"):
        main([*flags, "--output-prefix", str(tmp_path / shard_mb), "--shard-mb", shard_mb])
        assert same_files(tmp_path / shard_mb, tmp_path / "b")
    # Data sets of several sequences a document, merged by both.
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=numpy.uint16)
    builder.add_document(numpy.arange(9), [4, 5])
    builder.add_document(numpy.arange(3), [3])
    builder.finalize(str(tmp_path / "m.idx"))
    builder = IndexedDatasetBuilder(str(tmp_path / "all.bin"), dtype=numpy.uint16)
    for part in ("m", "b", "m"):
        builder.add_index(str(tmp_path / part))
    builder.finalize(str(tmp_path / "all.idx"))
    main(["merge", *(str(tmp_path / part) for part in ("m", "b", "m")), "--output-prefix", str(tmp_path / "merged")])
    assert same_files(tmp_path / "merged", tmp_path / "all")


def same_files(one: Path, other: Path) -> bool:
    return all(Path(f"{one}{s}").read_bytes() == Path(f"{other}{s}").read_bytes() for s in (".bin", ".idx"))


def test_split_and_duplicates(sentencepiece: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    texts = [TEXTS[i % 50] + "!" * (i % 3) for i in range(400)]
    (tmp_path / "c.jsonl").write_bytes(lines(texts))
    (tmp_path / "reversed.jsonl").write_bytes(lines(texts[::-1]))
    flags = [*flags_of(sentencepiece), "--shard-mb", "0.002", "--split", "70,20,10"]
    given = ["tokenize", "--input", str(tmp_path / "c.jsonl"), *flags]
    main([*given, "--output-prefix", str(tmp_path / "all")])
    main([*given, "--output-prefix", str(tmp_path / "once"), "--deduplicate"])
    main(["tokenize", "--input", str(tmp_path / "reversed.jsonl"), *flags, "--output-prefix", str(tmp_path / "back")])
    ids = {text: tuple(i) for text, i in zip(texts, ids_of(sentencepiece, texts), strict=True)}
    splits = {s: [tuple(d) for d in documents(tmp_path / f"all_{s}")] for s in ("train", "valid", "test")}
    place = {document: split for split, found in splits.items() for document in found}
    # Every document is in one split, in order; equal texts are in the same one, whatever their order was.
    for split, found in splits.items():
        assert found == [ids[text] for text in texts if place[ids[text]] == split]
        assert [tuple(d) for d in documents(tmp_path / f"back_{split}")] == found[::-1]
        # The first of equal documents stays.
        assert [tuple(d) for d in documents(tmp_path / f"once_{split}")] == list(dict.fromkeys(found))
    distinct = len(ids)
    shares = {split: len(set(found)) / distinct for split, found in splits.items()}
    assert shares["train"] == pytest.approx(0.7, abs=0.12) and shares["valid"] == pytest.approx(0.2, abs=0.1)
    assert f"{400 - distinct:,} duplicates left out" in capsys.readouterr().out


FAULTY = [
    b'{"text": "first"}',
    b'{"text": ""}',
    b"",
    b'{"text": "\xff"}',
    b"not json",
    b'{"body": "x"}',
    b'{"text": "second"}',
    b'{"text": "' + b"long " * 20000 + b'"}',
    b'{"text": "third"}',
]
KINDS = {2: "empty", 4: "not-utf8", 5: "not-json", 6: "no-field", 8: "too-large"}


@pytest.mark.parametrize("workers", [1, 2])
def test_faults_are_counted_and_reported(
    workers: int, sentencepiece: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
    files[0].write_bytes(b"\n".join(FAULTY) + b"\n")
    files[1].write_bytes(gzip.compress(b"\n".join(FAULTY)))
    prefix = tmp_path / "out"
    given = ["tokenize", "--input", *map(str, files), *flags_of(sentencepiece), "--output-prefix", str(prefix)]
    given += ["--shard-mb", "0.00003", "--max-document-mb", "0.05", "--workers", str(workers)]
    with pytest.raises(SystemExit) as error:
        main(given)
    assert error.value.code == 2 and not list(tmp_path.glob("out.*i*"))
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"sla-data: error: {files[0]}:2: no text, or white space alone (0 bytes): expected")
    main([*given, "--on-error", "skip"])
    assert documents(prefix) == ids_of(sentencepiece, ["first", "second", "third"] * 2)
    found = [json.loads(line) for line in (tmp_path / "out.faults").read_text().splitlines()]
    assert [(f["file"], f["line"], f["kind"]) for f in found] == [
        (str(file), line, kind) for file in files for line, kind in KINDS.items()
    ]
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["faults"] == dict.fromkeys(KINDS.values(), 2) | {}
    assert (manifest["lines"], manifest["blank_lines"], manifest["documents"]) == (18, 2, 6)
    assert "2 left out: not a JSON object (not-json in" in capsys.readouterr().out


def test_a_document_of_100_mb(sentencepiece: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with (tmp_path / "c.jsonl").open("wb") as file:
        file.write(lines(["before"]) + b'{"text": "')
        for _ in range(100):
            file.write(b"word " * 200_000)
        file.write(b'"}\n' + lines(["after"]))
    given = ["tokenize", "--input", str(tmp_path / "c.jsonl"), *flags_of(sentencepiece), "--output-prefix"]
    main([*given, str(tmp_path / "out"), "--on-error", "skip"])
    assert documents(tmp_path / "out") == ids_of(sentencepiece, ["before", "after"])
    assert "1 left out: larger than --max-document-mb" in capsys.readouterr().out
    (fault,) = (tmp_path / "out.faults").read_text().splitlines()
    assert json.loads(fault)["line"] == 2 and "10000001" in fault


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--append-eod", "--no-append-eod"], "out.json was made with append_eod = True, not False"),
        (["--split", "9,1"], "out.json was made with split = None, not [9.0, 1.0]"),
        (["--field", "body"], "out.json was made with inputs.field = text, not body"),
    ],
)
def test_finished_work_stays(
    change: list[str], message: str, sentencepiece: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(TEXTS))
    given = ["tokenize", "--input", str(tmp_path / "c.jsonl"), *flags_of(sentencepiece)]
    given += ["--output-prefix", str(tmp_path / "out")]
    main(given)
    before = (tmp_path / "out.bin").stat()
    main(given)
    assert "out.json: nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*given, *change])
    assert message in capsys.readouterr().err
    assert (tmp_path / "out.bin").stat() == before
    os.utime(tmp_path / "c.jsonl", ns=(1, 1))
    with pytest.raises(SystemExit):
        main(given)
    assert "modified_ns" in capsys.readouterr().err
    main([*given, "--overwrite"])
    assert documents(tmp_path / "out") == ids_of(sentencepiece, TEXTS)


def test_nothing_of_others_is_overwritten(
    sentencepiece: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(TEXTS))
    (tmp_path / "out.idx").write_text("mine")
    given = ["tokenize", "--input", str(tmp_path / "c.jsonl"), *flags_of(sentencepiece)]
    for command in ([*given], ["merge", str(tmp_path / "a")]):
        if command[0] == "merge":
            main([*given, "--output-prefix", str(tmp_path / "a")])
        with pytest.raises(SystemExit):
            main([*command, "--output-prefix", str(tmp_path / "out")])
        assert "out.idx exists: expected another --output-prefix" in capsys.readouterr().err
    assert (tmp_path / "out.idx").read_text() == "mine"
    assert not list(tmp_path.glob("out.sla-data"))


def test_parquet_with_nulls_and_dictionaries(
    sentencepiece: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A row without text is a fault with its number; a column that stores each text once is a column of texts."""
    texts = ["one", "two", None, "one", None, "three"]
    for name, column in (("plain", pyarrow.array(texts)), ("coded", pyarrow.array(texts).dictionary_encode())):
        file, prefix = tmp_path / f"{name}.parquet", tmp_path / name
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
        given = ["tokenize", "--input", str(file), *flags_of(sentencepiece), "--output-prefix", str(prefix)]
        with pytest.raises(SystemExit):
            main(given)
        assert f"{file}:3: " in capsys.readouterr().err.splitlines()[-1]
        main([*given, "--on-error", "skip"])
        assert documents(prefix) == ids_of(sentencepiece, [text for text in texts if text])
        faults = [json.loads(line) for line in Path(f"{prefix}.faults").read_text().splitlines()]
        assert [fault["line"] for fault in faults] == [3, 5]
