"""What ``torch.save`` wrote, at any place of a file, without copying it: tensors are views of mapped memory.

``torch.distributed.checkpoint`` puts each tensor into its files in this form, a zip archive whose members are not
compressed.  torch itself maps whole files alone.  Only what plain tensors are made of is known here; of
anything else, damaged files included, :class:`UnfamiliarError` says so, and the caller asks torch, which can say what
is wrong.
"""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor

_HEADER, _SIGNATURE = 30, b"PK\3\4"

_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
}


class UnfamiliarError(Exception):
    """Why something is left to torch."""


def read_tensor(path: Path, offset: int, length: int) -> Tensor:
    """The tensor that ``length`` bytes from ``offset`` on hold: a view that cannot be written to.

    It need not lie where its type would have it: copy it before you compute with it.
    """
    members = _members(path, offset, length)
    if bytes(members.get("byteorder", b"")) != sys.byteorder.encode() or "data.pkl" not in members:
        raise UnfamiliarError("no archive of torch.save of this byte order")
    try:
        found = _Unpickler(members).load()
    except UnfamiliarError:
        raise
    except Exception as error:  # Of damaged pickles anything comes.
        raise UnfamiliarError(repr(error)) from error
    if not isinstance(found, Tensor):
        raise UnfamiliarError(f"a {type(found).__name__}")
    return found


def _members(path: Path, offset: int, length: int) -> dict[str, memoryview]:
    """The archive's members, mapped, by their names within it."""
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        if length <= 0 or os.fstat(file.fileno()).st_size < offset + length:
            raise UnfamiliarError(f"{path} is shorter")
        pages = mmap.mmap(file.fileno(), offset + length - begin, offset=begin, access=mmap.ACCESS_READ)
    view, found = memoryview(pages), {}
    try:
        # What is before an archive is passed over.
        with ZipFile(pages) as archive:  # type: ignore[type-var]
            listed = archive.infolist()
    except Exception as error:  # Of damaged archives anything comes.
        raise UnfamiliarError(repr(error)) from error
    for member in listed:
        header = view[member.header_offset : member.header_offset + _HEADER]
        if member.compress_type != ZIP_STORED or len(header) < _HEADER or header[:4] != _SIGNATURE:
            raise UnfamiliarError(member.filename)
        name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        start = member.header_offset + _HEADER + name + extra
        data = view[start : start + member.file_size]
        if len(data) != member.file_size:
            raise UnfamiliarError(member.filename)
        found[member.filename.partition("/")[2]] = data
    return found


class _Unpickler(pickle.Unpickler):
    """Calls nothing but what plain tensors are made of."""

    def __init__(self, members: dict[str, memoryview]) -> None:
        super().__init__(BytesIO(members["data.pkl"]))
        self._members = members

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise UnfamiliarError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, memoryview]:
        kind, dtype, key, _, count = pid
        data = self._members[f"data/{key}"]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or len(data) != count * dtype.itemsize:
            raise UnfamiliarError(f"storage {key}")
        return dtype, data


def _tensor(
    storage: tuple[torch.dtype, memoryview], offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
) -> Tensor:
    """As ``torch._utils._rebuild_tensor_v2``."""
    (dtype, data), shape = storage, torch.Size(size)
    count = shape.numel()
    # Each is the product of the sizes behind it.
    rows_follow = tuple(stride) == tuple(shape[dim + 1 :].numel() for dim in range(len(shape)))
    if not rows_follow or not count:
        raise UnfamiliarError(f"a tensor of shape {tuple(shape)} and strides {tuple(stride)}")
    with warnings.catch_warnings(action="ignore"):  # It is not written to.
        return torch.frombuffer(data, dtype=dtype, count=count, offset=offset * dtype.itemsize).view(shape)
