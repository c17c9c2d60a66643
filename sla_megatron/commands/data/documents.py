"""The documents in a block, and what is wrong with those that are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow

#: Kinds of faults, each with what the report says of it.
FAULTS = {
    "empty": "no text, or white space alone",
    "not-utf8": "not UTF-8",
    "not-json": "not a JSON object",
    "no-field": "without the field, or its value is not text",
    "too-large": "larger than --max-document-mb",
    "tokenizer": "refused by the tokenizer",
}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its line (or row) in the block, from 1 on; ``encoded`` is the text's UTF-8."""

    line: int
    text: str
    encoded: bytes


@dataclass(frozen=True, slots=True)
class Fault:
    """What should have been a document: its line in the block, a key of :data:`FAULTS`, and what was found."""

    line: int
    kind: str
    detail: str


def fault_message(name: str, line: int, fault: Fault) -> str:
    """One line for a fault that ends the command, at ``line`` of the source ``name``."""
    return f"{name}:{line}: {FAULTS[fault.kind]} ({fault.detail}): expected a document, or --on-error skip"


def count_lines(payload: bytes, kind: str) -> tuple[int, int]:
    """How many lines (or rows) a block has, and how many of them are blank: no documents, and no faults."""
    if kind == "rows":
        return len(_column(payload)), 0
    if kind == "document":
        return 1, 0
    lines = _lines(payload)
    return len(lines), sum(not line.strip() for line in lines)


def read_documents(payload: bytes, kind: str, field: str, limit: int, first: bool) -> Iterator[Document | Fault]:
    """The documents of a block in order, and a fault in the place of each that cannot be one.

    Args:
        payload: lines, one document, or an Arrow stream of one binary column, as ``kind`` says.
        kind: jsonl, text, document or rows.
        field: of JSON lines, the key of the text.
        limit: the most bytes that a document (of JSON lines, the line) may have.
        first: whether the block starts its source, where a byte order mark may stand.
    """
    if first and kind != "rows":
        payload = payload.removeprefix(_BOM)
    if kind == "rows":
        values = enumerate((value.as_py() for value in _column(payload)), 1)
    elif kind == "document":
        values = iter([(1, payload)])
    else:
        values = ((n, line.removesuffix(b"\r")) for n, line in enumerate(_lines(payload), 1) if line.strip())
    for line, value in values:
        yield _document(line, value, kind, field, limit)


def _lines(payload: bytes) -> list[bytes]:
    lines = payload.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _column(payload: bytes) -> pyarrow.Array:
    import pyarrow.ipc

    return pyarrow.ipc.open_stream(payload).read_next_batch().column(0)


def _document(line: int, value: bytes | None, kind: str, field: str, limit: int) -> Document | Fault:
    if value is None:
        return Fault(line, "no-field", "null")
    if len(value) > limit:
        return Fault(line, "too-large", f"{len(value)} bytes")
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        return Fault(line, "not-utf8", f"byte {error.start}: {value[error.start : error.start + 4].hex(' ')}")
    if kind == "jsonl":
        text = _field(line, text, field)
        if isinstance(text, Fault):
            return text
        try:
            value = text.encode("utf-8")
        except UnicodeEncodeError as error:
            return Fault(line, "not-utf8", f"character {error.start}: half of a surrogate pair")
    if not text or text.isspace():
        return Fault(line, "empty", f"{len(value)} bytes")
    return Document(line, text, value)


def _field(line: int, text: str, field: str) -> str | Fault:
    try:
        record = json.loads(text)
    except RecursionError:
        return Fault(line, "not-json", "nested too deep")
    except json.JSONDecodeError as error:
        return Fault(line, "not-json", f"character {error.pos}: {error.msg}")
    except ValueError as error:  # A number of thousands of digits.
        return Fault(line, "not-json", str(error))
    if not isinstance(record, dict):
        return Fault(line, "not-json", f"{_json_type(record)}: expected an object")
    if field not in record:
        return Fault(line, "no-field", f"it has {', '.join(list(record)[:8]) or 'no field'}")
    if not isinstance(record[field], str):
        return Fault(line, "no-field", f"{field} is {_json_type(record[field])}")
    return record[field]


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
