"""The iterations that Megatron writes to TensorBoard's files (``training_log`` in megatron/training/training.py)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from .steps import Step

#: What is read of a file's beginning, where Megatron writes all arguments, and of its end.
_BEGIN, _END = 1 << 20, 1 << 18
_TAGS = {"lm loss": "loss", "batch-size": "batch", "iteration-time": "seconds"}


def newest_events(folder: Path) -> Path | None:
    """The file of the attempt that wrote to ``folder`` last; each writes one of its own."""
    found = {path: path.stat().st_mtime for path in folder.glob("events.out.tfevents.*")}
    return max(found, key=found.__getitem__) if found else None


def logged_steps(path: Path) -> tuple[Step, Step] | None:
    """The first and the last iteration in one file; None without any, or without the package ``tensorboard``."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError:
        return None
    with path.open("rb") as file:
        begin = file.read(_BEGIN)
        file.seek(max(0, file.seek(0, 2) - _END))
        end = file.read(_END)
    first, last = (_steps(map(Event.FromString, _records(data))) for data in (begin, end))
    return (first[min(first)], last[max(last)]) if first and last else None


def _steps(events: Iterator) -> dict[int, Step]:
    found: dict[int, dict[str, float]] = {}
    for event in events:
        for value in event.summary.value:
            if value.tag in _TAGS:
                known = found.setdefault(event.step, {"time": event.wall_time})
                known[_TAGS[value.tag]] = value.simple_value
    return {iteration: Step(iteration, **known) for iteration, known in found.items() if "loss" in known}


def _records(data: bytes) -> Iterator[bytes]:
    """The whole records in ``data``, which may begin within one.

    A record is its length (8 bytes), a checksum of that, itself, and a checksum of it; all little-endian.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    at = 0
    while at + 12 <= len(data):
        length, checksum = struct.unpack_from("<QI", data, at)
        # Cheap first: a byte that begins no record is rarely followed by a length that fits.
        if length > len(data) - at or masked_crc32c(data[at : at + 8]) != checksum:
            at += 1
            continue
        record = data[at + 12 : at + 12 + length]
        if len(record) == length:
            yield record
        at += length + 16
