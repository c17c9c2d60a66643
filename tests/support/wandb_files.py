"""What wandb wrote, offline: of each ``.wandb`` file its run's id and the steps that it logged.

The file is a log as LevelDB has them (after 7 bytes of wandb's own), each record one of wandb's protocol buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_HEADER, _BLOCK, _WHOLE, _LAST = 7, 32768, 1, 4


def recorded(folder: Path) -> list[tuple[str, list[int]]]:
    """Of every attempt's file in ``folder``, where offline runs have folders: the run's id, and its steps."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("offline-run-*/run-*.wandb")):
        run, steps = "", []
        for data in _records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run.run_id
            elif kind == "history":
                steps.append(record.history.step.num)
        found.append((run, steps))
    return found


def _records(data: bytes) -> Iterator[bytes]:
    at, record = _HEADER, b""
    while at + _HEADER <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _HEADER:
            at += left
            continue
        # A checksum of 4 bytes comes first.
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""
