"""What ``torch.save`` wrote, at any place of a file, without copying it: tensors are views of mapped memory.

``torch.distributed.checkpoint`` puts each tensor into its files in this form, a zip archive whose members are not
compressed.  torch itself maps whole files alone.  Only what plain tensors and settings are made of is known here; of
anything else, damaged files included, :class:`UnfamiliarError` says so, and the caller asks torch, which can say what
is wrong.
"""

from __future__ import annotations

import argparse
import mmap
import os
import pickle
import signal
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path, PosixPath
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

#: Where Megatron's enumerations are, members of which are among its arguments.
_ENUMERATIONS = "megatron.core.transformer.enums"


class UnfamiliarError(Exception):
    """Why something is left to torch."""


class Member:
    """A member of an enumeration of Megatron's, whose import takes seconds: ``enumeration`` names it.

    Attributes:
        value: the member's.
    """

    enumeration = ""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"{self.enumeration.rpartition('.')[2]}({self.value})"


class Unknown:
    """In place of an object of a class that is not known here: whatever it was given is dropped."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = __init__


def read_tensor(path: Path, offset: int, length: int) -> Tensor:
    """The tensor that ``length`` bytes from ``offset`` on hold: a view that cannot be written to.

    It need not lie where its type would have it: copy it before you compute with it.
    """
    found = _unpickled(_members(path, offset, length), _Unpickler)
    if not isinstance(found, Tensor):
        raise UnfamiliarError(f"a {type(found).__name__}")
    return found


def read_settings(path: Path, offset: int = 0, length: int | None = None) -> Any:
    """An object of builtin types, namespaces, dtypes and signals; in place of anything else are stand-ins.

    Those of Megatron's enumerations are :class:`Member`, of the rest, tensors too, :class:`Unknown`.
    """
    return _unpickled(_members(path, offset, path.stat().st_size if length is None else length), _SettingsUnpickler)


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


def _unpickled(members: dict[str, memoryview], unpickler: type[_Unpickler]) -> Any:
    if bytes(members.get("byteorder", b"")) != sys.byteorder.encode() or "data.pkl" not in members:
        raise UnfamiliarError("no archive of torch.save of this byte order")
    try:
        return unpickler(members).load()
    except UnfamiliarError:
        raise
    except Exception as error:  # Of damaged pickles anything comes.
        raise UnfamiliarError(repr(error)) from error


class _Unpickler(pickle.Unpickler):
    """Calls nothing but what is listed here."""

    def __init__(self, members: dict[str, memoryview]) -> None:
        super().__init__(BytesIO(members["data.pkl"]))
        self._members = members
        self._known: dict[tuple[str, str], Any] = {
            ("argparse", "Namespace"): argparse.Namespace,
            ("types", "SimpleNamespace"): types.SimpleNamespace,
            ("collections", "OrderedDict"): OrderedDict,
            ("pathlib", "PosixPath"): PosixPath,
            ("signal", "Signals"): signal.Signals,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module == _ENUMERATIONS and name.isidentifier():
            # Kept, so that all members of one are of one class.
            return self._known.setdefault((module, name), type(name, (Member,), {"enumeration": f"{module}.{name}"}))
        raise UnfamiliarError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, memoryview]:
        kind, dtype, key, _, count = pid
        data = self._members[f"data/{key}"]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or len(data) != count * dtype.itemsize:
            raise UnfamiliarError(f"storage {key}")
        return dtype, data


class _SettingsUnpickler(_Unpickler):
    """Has a stand-in for anything else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return Unknown if name.startswith("_rebuild_") else super().find_class(module, name)
        except UnfamiliarError:
            return Unknown

    def persistent_load(self, pid: Any) -> Any:
        return Unknown()


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
