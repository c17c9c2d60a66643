"""Blocks: all of the text, in order, cut at line ends, the same from wherever the reading begins."""

from __future__ import annotations

import gzip
import io
import json
from argparse import ArgumentParser
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.commands.data import blocks
from sla_megatron.commands.data.blocks import cut_lines, cut_whole
from sla_megatron.commands.data.errors import DataError
from sla_megatron.commands.data.inputs import Inputs, add_input_arguments, inputs_from_args

LINES = st.lists(st.integers(0, 40), max_size=40)


def inputs(*flags: str) -> Inputs:
    parser = ArgumentParser()
    add_input_arguments(parser)
    return inputs_from_args(parser.parse_args(list(map(str, flags))))


@given(LINES, st.booleans(), st.integers(1, 60), st.integers(1, 60), st.integers(1, 50))
def test_lines_are_cut_at_their_ends(lengths: list[int], ended: bool, block_bytes: int, limit: int, chunk: int) -> None:
    text = b"\n".join(b"%c" % (97 + i % 26) * length for i, length in enumerate(lengths)) + b"\n" * ended
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_CHUNK", chunk)
        cuts = list(cut_lines(io.BytesIO(text).read, block_bytes, limit, 0))
        for cut in cuts:  # From the end of any cut on, the rest is cut as before.
            rest = io.BytesIO(text)
            rest.seek(cut.end)
            assert list(cut_lines(rest.read, block_bytes, limit, cut.end)) == [c for c in cuts if c.start >= cut.end]
    assert [cut.start for cut in cuts] == [0, *(cut.end for cut in cuts)][: len(cuts)]
    assert not cuts or cuts[-1].end == len(text)
    for cut in cuts:
        piece = text[cut.start : cut.end]
        assert piece.endswith(b"\n") or cut.end == len(text)
        if cut.payload is None:
            assert piece.count(b"\n") <= 1 and cut.too_large == len(piece.rstrip(b"\n")) > limit
        else:
            assert cut.payload == piece and len(piece) <= block_bytes + limit + chunk
            # No longer than needed: without its last line it is too short.
            assert len(piece.rstrip(b"\n").rpartition(b"\n")[0]) < block_bytes


@given(st.integers(9, 20), st.sampled_from([b"", b"\n", b"\r", b"\r\n"]), st.integers(1, 25))
def test_what_is_too_large_is_counted_without_its_end(size: int, end: bytes, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_CHUNK", chunk)
        assert [cut.too_large for cut in cut_lines(io.BytesIO(b"x" * size + end).read, 1, 4, 0)] == [size]


@given(st.integers(0, 30), st.integers(1, 30))
def test_a_whole_file_is_one_cut(size: int, limit: int) -> None:
    cuts = list(cut_whole(io.BytesIO(b"x" * size).read, limit, 0))
    assert [(cut.start, cut.end) for cut in cuts] == ([(0, size)] if size else [])
    assert all(cut.payload == (b"x" * size if size <= limit else None) for cut in cuts)


def write(path: Path, texts: list[str]) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        # Two members, as parallel compressors write them.
        data = gzip.compress(data[:100]) + gzip.compress(data[100:])
    elif path.suffix == ".zst":
        data = pyarrow.Codec("zstd").compress(data, asbytes=True)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(len(texts))}), path, row_group_size=7)
        return path
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_source_goes_on_from_any_block(suffix: str, tmp_path: Path) -> None:
    texts = [f"document {i} " + "word " * (i % 50) for i in range(500)]
    for name, part in {"b": texts[:300], "a": texts[300:], "empty": []}.items():
        write(tmp_path / (name + suffix), part)
    files = [tmp_path / (name + suffix) for name in ("b", "a", "empty")]
    given = inputs("--input", *files, "--shard-mb", "0.006")
    all_blocks = list(given.blocks())
    assert len(all_blocks) > 5
    assert [d.text for block in all_blocks for d in given.documents(block)] == texts
    assert [block.number for block in all_blocks] == list(range(len(all_blocks)))
    assert given.work == sum(file.stat().st_size for file in files)
    total = sum(block.work for block in all_blocks)
    assert given.work * 0.9 < total + files[-1].stat().st_size <= given.work + 1e-6
    done = 0.0
    for block, after in zip(all_blocks, all_blocks[1:], strict=False):
        assert block.last == (after.source != block.source)
        source, start = (block.source + 1, 0) if block.last else (block.source, block.end)
        done = 0.0 if block.last else done + block.work
        assert list(given.blocks(after.number, source, start, done)) == all_blocks[after.number :]


def test_folders_and_patterns_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "sub/a.jsonl.gz", "a.txt", "x.md"):
        write(tmp_path / name, ["text"])
    assert [s.name for s in inputs("--input", tmp_path).sources] == [
        str(tmp_path / name) for name in ("a.txt", "b.jsonl", "sub/a.jsonl.gz")
    ]
    assert [s.kind for s in inputs("--input", tmp_path / "*.t*", tmp_path / "b.jsonl").sources] == ["text", "jsonl"]
    assert [s.kind for s in inputs("--input", tmp_path / "x.md", "--format", "document").sources] == ["document"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--input and --dataset: expected one of them"),
        (["--input", "{}/a.jsonl", "--dataset", "x"], "--input and --dataset: expected one of them"),
        (["--input", "{}/a.jsonl", "--streaming"], "--streaming: expected with --dataset"),
        (["--input", "{}/gone.jsonl"], "--input {}/gone.jsonl: expected files of text: .jsonl"),
        (["--input", "{}/x.md"], "--input {}/x.md: its name does not tell what it is: expected --format"),
        (["--input", "{}/a.jsonl", "{}"], "--input {}/a.jsonl: expected each file once"),
        (["--input", "{}/a.parquet", "--field", "body"], "--field body: {}/a.parquet has the columns text, n"),
        (["--input", "{}/broken.parquet"], "--input {}/broken.parquet: Parquet magic bytes not found"),
        (["--dataset", "{}/gone"], "--dataset {}/gone train: "),
    ],
)
def test_bad_inputs(flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(tmp_path / "a.jsonl", ["text"])
    write(tmp_path / "x.md", ["text"])
    if "parquet" in str(flags):
        write(tmp_path / "a.parquet", ["text"])
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError) as error:
        inputs(*(flag.replace("{}", str(tmp_path)) for flag in flags))
    assert str(error.value).startswith(message.replace("{}", str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_truncated_files_are_noticed(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}", [str(i) * 50 for i in range(200)])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=f"a{suffix}: Truncated"):
        list(inputs("--input", path).blocks())
