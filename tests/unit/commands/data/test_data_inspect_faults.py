"""``sla-data inspect`` on data that are wrong or cannot be read: every byte that is another is noticed, by its line."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from sla_megatron.commands.data import contents, inspection
from sla_megatron.commands.data.contents import scan
from sla_megatron.commands.data.errors import DataError
from sla_megatron.commands.data.inspection import open_index
from sla_megatron.common.tokenizers import TokenizerError

from .indexed_data import (
    Documents,
    faults_of,
    five_sequences,
    flags,
    random_documents,
    run,
    train_model,
    write,
)

pytestmark = pytest.mark.usefixtures("megatron_imported")

HEADER = 34


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def five(tmp_path: Path) -> str:
    return five_sequences(tmp_path / "data")


# What is wrong


def patched(path: Path, offset: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(new)] = new
    path.write_bytes(content)


def int32(value: int) -> bytes:
    return struct.pack("<i", value)


def int64(value: int) -> bytes:
    return struct.pack("<q", value)


# In the index of five_sequences().
LENGTHS, POINTERS, ENDS = HEADER, HEADER + 4 * 5, HEADER + 12 * 5
FAULTS: dict[str, tuple[int, bytes, list[str]]] = {
    "version": (9, int64(2), ["version 2, expected 1"]),
    "unknown dtype": (17, b"\x09", ["dtype code 9, expected one of 1, 2, 3, 4, 5, 6, 7, 8"]),
    "float dtype": (17, b"\x07", ["dtype float32, expected whole numbers"]),
    "wider dtype": (
        17,
        b"\x04",
        ["sequence 1 starts at byte 8, expected 16", "data.bin: 40 bytes, expected 80 by the lengths in data.idx"],
    ),
    "sequences": (18, int64(6), ["126 bytes, expected 138 for 6 sequences and 4 document indices"]),
    "absurd sequences": (18, int64(2**60), ["126 bytes, expected 13835058055282163778 for"]),
    "document count": (26, int64(5), ["126 bytes, expected 134 for 5 sequences and 5 document indices"]),
    "negative length": (
        LENGTHS + 4,
        int32(-4),
        [
            "sequence 1 has the length -4, expected none below 0",
            "sequence 2 starts at byte 16, expected 0",
            "data.bin: 40 bytes, expected 24",
        ],
    ),
    "longer": (
        LENGTHS + 8,
        int32(5),
        ["sequence 3 starts at byte 24, expected 26", "data.bin: 40 bytes, expected 42"],
    ),
    "last longer": (LENGTHS + 16, int32(5), ["data.bin: 40 bytes, expected 42"]),
    "first pointer": (POINTERS, int64(2), ["sequence 0 starts at byte 2, expected 0"]),
    "pointer": (POINTERS + 16, int64(-(2**62)), ["sequence 2 starts at byte -4611686018427387904, expected 16"]),
    "first document": (ENDS, int64(1), ["the first document index is 1, expected 0"]),
    "documents decrease": (ENDS + 16, int64(1), ["document index 2 is 1, expected at least 2, the one before it"]),
    "negative document": (
        ENDS + 8,
        int64(-1),
        ["document index 1 is -1, expected at least 0, the one before it"],
    ),
    "last document": (ENDS + 24, int64(4), ["the last document index is 4, expected 5, the number of sequences"]),
    "beyond": (
        ENDS + 16,
        int64(2**62),
        ["document index 3 is 5, expected at least 4611686018427387904, the one before it"],
    ),
}


@pytest.mark.parametrize("entries", [1, 2, 1000])
@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_index_is_found(
    name: str,
    entries: int,
    five: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(inspection, "ENTRIES", entries)
    assert run(five, "--documents", 0) == 0
    capsys.readouterr()
    offset, new, expected = FAULTS[name]
    patched(tmp_path / "data.idx", offset, new)
    assert run(five) == 1
    head, *wrong, verdict = capsys.readouterr().out.splitlines()
    assert head == five and verdict == f"  not sound: {len(expected)} failed"
    assert len(wrong) == len(expected)
    for line, part in zip(wrong, expected, strict=True):
        assert line.startswith(f"  wrong: {tmp_path}/data.") and part in line


def test_any_byte_of_the_index(five: str, tmp_path: Path) -> None:
    """Whatever byte is another, something does not fit; but for where one document ends and the next begins."""
    content = (tmp_path / "data.idx").read_bytes()
    for offset in range(9, len(content)):
        for flip in (0x01, 0x80, 0xFF):
            patched(tmp_path / "data.idx", offset, bytes([content[offset] ^ flip]))
            other_documents = flip == 0x01 and offset in (ENDS + 8, ENDS + 16)
            assert bool(faults_of(five)) != other_documents, (offset, flip)
        patched(tmp_path / "data.idx", offset, content[offset : offset + 1])


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("data.idx", 125, "125 bytes, expected 126"),
        ("data.idx", 127, "127 bytes, expected 126"),
        ("data.bin", 39, "39 bytes, expected 40"),
        ("data.bin", 42, "42 bytes, expected 40"),
        ("data.bin", 0, "0 bytes, expected 40"),
    ],
)
def test_another_size(
    name: str, size: int, expected: str, five: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(tmp_path / name, "r+b") as file:
        file.truncate(size)
    assert run(five) == 1
    assert f"  wrong: {tmp_path / name}: {expected}" in capsys.readouterr().out


@pytest.mark.parametrize("documents", [[], [[]], [[[]], [[], []]]])
def test_no_tokens(documents: Documents, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "data", documents)
    assert run(prefix) == 1
    assert "data.bin: no tokens, expected at least one: Megatron cannot open an empty file" in capsys.readouterr().out
    # What Megatron does first.
    with pytest.raises(ValueError, match="cannot mmap an empty file"):
        numpy.memmap(f"{prefix}.bin", mode="r")


def test_no_document_indices(tmp_path: Path) -> None:
    (tmp_path / "data.bin").touch()
    (tmp_path / "data.idx").write_bytes(struct.pack("<9sQBQQ", inspection.MAGIC, 1, 8, 0, 0))
    assert "no document indices, expected at least the first, 0" in faults_of(str(tmp_path / "data"))[0]


def test_modes_of_multimodal_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = random_documents(5)
    assert run(write(tmp_path / "data", documents, multimodal=True), "--documents", 1) == 0
    assert f"sequences          {sum(map(len, documents))}, with modes\n" in capsys.readouterr().out


@pytest.mark.parametrize("chunk", [2, 6, 1000])
@pytest.mark.parametrize(
    ("dtype", "token", "expected"),
    [
        (numpy.uint16, 400, "id 400, expected 0 or more and less than 400, the size of the vocabulary (2 such tokens)"),
        (numpy.int32, 70000, "id 70000, expected 0 or more and less than 400"),
        (numpy.int32, -3, "id -3, expected 0 or more and less than 400"),
    ],
)
def test_ids_outside_the_vocabulary(
    dtype: type,
    token: int,
    expected: str,
    chunk: int,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(contents, "CHUNK_BYTES", chunk * numpy.dtype(dtype).itemsize)
    prefix = write(tmp_path / "data", [[[5, 6, 7], []], [], [[8, 9], [], [10, token, 3]], [[token]]], dtype)
    assert run(prefix, *flags(model), "--characters", 20) == 1
    printed = capsys.readouterr().out
    assert f"  wrong: {prefix}.bin: document 2, token 3: {expected}" in printed
    # A text there is not.
    assert f"    8 9 10 {token} 3\n" in printed
    assert run(prefix, *flags(model), "--no-scan") == 0


def test_negative_ids_need_no_vocabulary(tmp_path: Path) -> None:
    ids = scan(open_index(write(tmp_path / "data", [[[5]], [[6, -1, -2]]], numpy.int32)), None)
    assert ids.fault == f"{tmp_path}/data.bin: document 1, token 1: id -1, expected 0 or more (2 such tokens)"
    assert (ids.least, ids.greatest, ids.different) == (-2, 6, None)


def test_ids_far_beyond_a_vocabulary(tmp_path: Path) -> None:
    ids = scan(open_index(write(tmp_path / "data", [[[5, 2**31 - 1]]], numpy.int32)), None)
    assert (ids.greatest, ids.different, ids.fault) == (2**31 - 1, None, None)


# What cannot be read


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove("data.idx"), "data.idx cannot be read: No such file or directory$"),
        (remove("data.bin"), "data.bin cannot be read: No such file or directory$"),
        (lambda folder: patched(folder / "data.idx", 0, b"X"), "data.idx is not an index of Megatron's: it starts"),
        (lambda folder: (folder / "data.idx").write_bytes(b""), "data.idx is not an index of Megatron's: it starts"),
        (
            lambda folder: (folder / "data.idx").write_bytes(inspection.MAGIC + b"\x01"),
            "data.idx is cut off: 10 bytes, a header has 34",
        ),
    ],
)
def test_unreadable(damage: Callable[[Path], None], expected: str, five: str, tmp_path: Path) -> None:
    damage(tmp_path)
    with pytest.raises(DataError, match=expected):
        run(five)


def test_a_file_in_place_of_its_prefix(five: str) -> None:
    with pytest.raises(DataError, match="data.bin.idx cannot be read: .*: expected PREFIX without .bin or .idx"):
        run(f"{five}.bin")


def test_several(five: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(tmp_path / "other", random_documents())
    assert run(five, other, "--documents", 0) == 0
    assert capsys.readouterr().out.count("  sound: ") == 2
    patched(tmp_path / "data.idx", 9, b"\x07")
    assert run(five, other, "--documents", 0) == 1
    printed = capsys.readouterr().out
    assert printed.count("  sound: ") == printed.count("  not sound: 1 failed") == 1
    assert run(five, tmp_path / "gone", other, "--documents", 0) == 2
    printed = capsys.readouterr()
    assert printed.out.count("  sound: ") == printed.out.count("  not sound: 1 failed") == 1
    assert printed.err == f"sla-data: error: {tmp_path}/gone.idx cannot be read: No such file or directory\n"


def test_tokenizer_flags(five: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected --tokenizer-type beside them"):
        run(five, "--tokenizer-model", "x")
    with pytest.raises(TokenizerError, match="SentencePieceTokenizer .*gone cannot be read"):
        run(five, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tmp_path / "gone")
