"""Read a Hugging Face folder: our own export, or a dense Llama-family or GPT-2 model, under our format's names."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...attention.sla_config import evenly_spread
from .architecture import MODEL_TYPE
from .errors import ConvertError
from .foreign import FOREIGN, Foreign
from .hf_folder import PADDING_FILE
from .mapping import entries, sla_of


class HFSource:
    """A :class:`~sla_megatron.commands.convert.source.Source` on a folder of safetensors.

    Raises:
        ConvertError: for another architecture, or if the folder's tensors are not those that its ``config.json``
            describes.
    """

    args: Namespace | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        config = _read_json(path / "config.json")
        foreign = _foreign(config, path)
        self._foreign = foreign
        self.config: Mapping[str, Any] = config if foreign is None else foreign.config(config)
        self._files = _weight_files(path)
        self._entries = {entry.hf: entry for entry in entries(self.config)}
        self._check()

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._slice(self._stored_name(name))[:0].dtype

    def get(self, name: str) -> Tensor:
        """The tensor, read from its file."""
        tensor = self._slice(self._stored_name(name))[:]
        return tensor if self._foreign is None else self._foreign.tensor(name, tensor).contiguous()

    def padding(self, name: str) -> Tensor | None:
        """The rows that an export cut, where it kept them beside the model."""
        path = self.path / PADDING_FILE
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            return file.get_tensor(name) if name in file.keys() else None

    def _stored_name(self, name: str) -> str:
        stored = name if self._foreign is None else self._foreign.name(name)
        if stored not in self._files and f"transformer.{stored}" in self._files:
            return f"transformer.{stored}"
        return stored

    def _slice(self, stored: str) -> Any:
        try:
            with safe_open(self._files[stored], "pt") as file:
                return file.get_slice(stored)
        except (OSError, SafetensorError) as error:
            raise ConvertError(f"{self._files[stored]}: {stored} cannot be read: {error}") from error

    def _check(self) -> None:
        known = set()
        for name, entry in self._entries.items():
            stored = self._stored_name(name)
            known.add(stored)
            if stored not in self._files:
                raise ConvertError(f"{self.path}: tensor {stored} ({name}) is missing")
            shape = tuple(self._slice(stored).get_shape())
            expected = entry.shape if self._foreign is None else self._foreign.stored_shape(name, entry.shape)
            if shape != expected:
                raise ConvertError(f"{self.path}: tensor {stored} has shape {shape}, {name} needs {expected}")
        ignored = () if self._foreign is None else self._foreign.ignored
        for stored in sorted(set(self._files) - known):
            if not stored.endswith(ignored):
                raise ConvertError(f"{self.path}: tensor {stored} is not part of this architecture")


def _foreign(config: Mapping[str, Any], path: Path) -> Foreign | None:
    kind = config.get("model_type")
    if kind == MODEL_TYPE:
        groups = config["num_key_value_heads"]
        if tuple(config["sla_skip_groups"]) != evenly_spread(len(config["sla_skip_groups"]), groups):
            raise ConvertError(f"{path}: sla_skip_groups {config['sla_skip_groups']} are not spread evenly")
        sla_of(config)
        return None
    if kind not in FOREIGN:
        raise ConvertError(f"{path}: model_type {kind}: expected {MODEL_TYPE}, {', '.join(FOREIGN)}")
    return FOREIGN[kind](config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path} cannot be read: {error}") from error


def _weight_files(path: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = sorted({path / name for name in _read_json(index)["weight_map"].values()})
    else:
        files = [path / "model.safetensors"]
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ConvertError(f"{file} cannot be read: {error}") from error
    return found
