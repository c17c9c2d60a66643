"""Documents and faults of a block: each line is one or the other, or blank."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla_megatron.commands.data.documents import FAULTS, Document, Fault, count_lines, read_documents
from sla_megatron.commands.data.errors import DataError
from sla_megatron.commands.data.sources import Table, _packed

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: not t.isspace()))


def read(payload: bytes, kind: str = "jsonl", limit: int = 100, first: bool = False) -> list[Document | Fault]:
    return list(read_documents(payload, kind, "text", limit, first))


@given(TEXTS, st.booleans())
def test_texts_come_back(texts: list[str], escaped: bool) -> None:
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=escaped).encode() + b"\n" for text in texts]
    found = read(b"".join(lines), limit=10**6)
    assert [(d.line, d.text, d.encoded) for d in found] == [(i, t, t.encode()) for i, t in enumerate(texts, 1)]
    rows = _packed([pyarrow.array([t.encode() for t in texts], pyarrow.large_binary())])
    assert [d.text for d in read(rows, "rows", limit=10**6)] == texts
    assert count_lines(b"".join(lines), "jsonl") == (len(texts), 0)
    assert count_lines(rows, "rows") == (len(texts), 0)


@pytest.mark.parametrize(
    ("line", "kind", "detail"),
    [
        (b'{"text": ""}', "empty", "0 bytes"),
        (b'{"text": " \\n\\t"}', "empty", "3 bytes"),
        (b'{"text": "\xff"}', "not-utf8", "byte 10: ff 22 7d"),
        (b'{"text": "a\\ud800b"}', "not-utf8", "character 1: half of a surrogate pair"),
        (b'{"text": "a"', "not-json", "character 12: Expecting ',' delimiter"),
        (b"text", "not-json", "character 0: Expecting value"),
        (b'["text"]', "not-json", "an array: expected an object"),
        (b"3", "not-json", "a number: expected an object"),
        (b"[" * 90, "not-json", "character 90: Expecting value"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "not-json", "Exceeds the limit (4300 digits)"),
        (b'{"body": "a", "id": 3}', "no-field", "it has body, id"),
        (b"{}", "no-field", "it has no field"),
        (b'{"text": null}', "no-field", "text is null"),
        (b'{"text": ["a"]}', "no-field", "text is an array"),
        (b'{"text": "' + b"x" * 100 + b'"}', "too-large", "112 bytes"),
    ],
)
def test_faults_of_json_lines(line: bytes, kind: str, detail: str) -> None:
    good = b'{"text": "good"}\n'
    found = read(good + b"\n" + line + b"\r\n" + good, limit=100 if kind == "too-large" else 10**4)
    assert [d.line for d in found] == [1, 3, 4]
    assert [d.text for d in found if isinstance(d, Document)] == ["good", "good"]
    fault = found[1]
    assert isinstance(fault, Fault) and fault.kind == kind and kind in FAULTS
    assert fault.detail.startswith(detail)
    assert count_lines(good + b"\n" + line + b"\r\n" + good, "jsonl") == (4, 1)


def test_deep_nesting_is_a_fault() -> None:
    (fault,) = read(b'{"text": ' + b"[" * 10**5, limit=10**6)
    assert fault.kind == "not-json"


def test_lines_of_text() -> None:
    found = read(
        b"\xef\xbb\xbfone\r\n\n  \ntwo \xe2\x80\xa8 lines\n\xfe\n" + b"x" * 101 + b"\nlast", "text", first=True
    )
    assert [(d.line, getattr(d, "text", None) or d.kind) for d in found] == [
        (1, "one"),
        (4, "two \u2028 lines"),
        (5, "not-utf8"),
        (6, "too-large"),
        (7, "last"),
    ]


@pytest.mark.parametrize(("payload", "found"), [(b"a\n\nb\n", "a\n\nb\n"), (b" \n", "empty"), (b"\xff", "not-utf8")])
def test_whole_documents(payload: bytes, found: str) -> None:
    (document,) = read(payload, "document")
    assert (getattr(document, "text", None) or document.kind, document.line) == (found, 1)


def test_rows() -> None:
    rows = [b"good", None, b"", b"\xff\xfe", b"x" * 101, "gute Straße".encode()]
    found = read(_packed([pyarrow.array(rows, pyarrow.large_binary())]), "rows")
    assert [(d.line, getattr(d, "text", None) or d.kind) for d in found] == [
        (1, "good"),
        (2, "no-field"),
        (3, "empty"),
        (4, "not-utf8"),
        (5, "too-large"),
        (6, "gute Straße"),
    ]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
def test_columns_of_text(kind: pyarrow.DataType) -> None:
    table = pyarrow.table({"text": pyarrow.array(["a", None, "b"], kind)})
    source = Table("t", datasets.Dataset(pyarrow.table({"text": ["a"]})), "text", 1, "rows", {})
    assert source._binary(table).to_pylist() == [b"a", None, b"b"]


def test_a_column_must_hold_text(tmp_path: Path) -> None:
    source = Table("t", datasets.Dataset.from_dict({"text": [1, 2]}), "text", 2, "rows", {})
    with pytest.raises(DataError, match="--field text: t holds int64 there: expected text"):
        list(source.cuts(0, 10, 10))
