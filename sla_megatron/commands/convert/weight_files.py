"""The tensors of a Hugging Face folder, by their stored names: safetensors, or files of ``torch.save``."""

from __future__ import annotations

import json
import mmap
import pickle
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...common.errors import first_line
from .errors import ConvertError

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_SAFE, _TORCH = "model.safetensors", "pytorch_model.bin"


class WeightFiles:
    """The weights of one folder, mapped into memory.

    As in transformers, safetensors come before ``pytorch_model.bin``, and one file before several with an index.

    Raises:
        ConvertError: if there are none, or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._loaded: dict[Path, dict[str, Tensor]] = {}
        self._mapped: dict[Path, _Mapped] = {}
        self._files = {name: file for file in _files(folder) for name in self._names_in(file)}

    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape."""
        found = self._find(name)
        return tuple(found.shape if isinstance(found, Tensor) else found.get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The stored type."""
        found = self._find(name)
        return found.dtype if isinstance(found, Tensor) or not found.get_shape() else found[:0].dtype

    def get(self, name: str) -> Tensor:
        """The tensor, read from its file."""
        found = self._find(name)
        return found if isinstance(found, Tensor) else found[:]

    def _names_in(self, file: Path) -> list[str]:
        if file.suffix == ".bin":
            self._loaded[file] = _unpickled(file)
            return list(self._loaded[file])
        try:
            with safe_open(file, "pt") as opened:
                names = list(opened.keys())
            self._mapped[file] = _Mapped(file)
            return names
        except (OSError, SafetensorError) as error:
            raise ConvertError(f"{file} cannot be read: {error}") from error

    def _find(self, name: str) -> Any:
        file = self._files[name]
        if file in self._loaded:
            return self._loaded[file][name]
        if name in self._mapped[file].places:
            return self._mapped[file].tensor(name)
        try:
            with safe_open(file, "pt") as opened:
                found = opened.get_slice(name)
                # A tensor without dimensions has no slices.
                return found if found.get_shape() else opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ConvertError(f"{file}: {name} cannot be read: {error}") from error


class _Mapped:
    """The floating point tensors of a file of safetensors, which its library found sound, as views of mapped memory.

    Each is of memory of its own, so that a writer need not copy it; the library's are all of one.
    """

    def __init__(self, file: Path) -> None:
        with file.open("rb") as opened:
            view = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        begin = 8 + int.from_bytes(view[:8], "little")
        self._data = view[begin:]
        self.places = {
            name: (_TYPES[entry["dtype"]], tuple(entry["shape"]), slice(*entry["data_offsets"]))
            for name, entry in json.loads(bytes(view[8:begin])).items()
            if name != "__metadata__"
            and entry["dtype"] in _TYPES
            and entry["data_offsets"][0] < entry["data_offsets"][1]
        }

    def tensor(self, name: str) -> Tensor:
        """Not to be written to."""
        dtype, shape, place = self.places[name]
        with catch_warnings(action="ignore"):
            return torch.frombuffer(self._data[place], dtype=dtype).view(shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.  Raises ``ConvertError`` if it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConvertError(f"{path}: expected an object, not a {type(found).__name__}")
    return found


def _files(folder: Path) -> list[Path]:
    for single in (_SAFE, _TORCH):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise ConvertError(f"{index}: expected a weight_map, the files by the tensors that they hold")
            return sorted({folder / str(name) for name in files.values()})
    raise ConvertError(f"{folder} holds no weights: expected {_SAFE} or {_TORCH}, or either's index")


def _unpickled(file: Path) -> dict[str, Tensor]:
    """What a file of ``torch.save`` holds, tensors alone: unpickling anything else might run code."""
    try:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            # Files of the format before torch 1.6 cannot be mapped.
            if "mmap can only be used" not in str(error):
                raise
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConvertError(f"{file} holds more than tensors, or is none of torch.save: not loaded") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ConvertError(f"{file} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ConvertError(f"{file} holds a {type(found).__name__}: expected tensors by name")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise ConvertError(f"{file}: {name} is a {type(value).__name__}: expected tensors by name alone")
    return {name: tensor.detach() for name, tensor in found.items()}
