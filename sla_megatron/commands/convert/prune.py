"""A ``full`` skip-layer model without the rows of its K/V weights that nobody reads: the same function."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .architecture import MODEL_TYPE, rope_parameters
from .errors import ConvertError
from .hf_folder import (
    CODE_FILES,
    OLD_PADDING_FILE,
    PADDING_FILE,
    TensorInfo,
    model_kind,
    padding_file,
    write_code,
    write_json,
    write_weights,
)
from .hf_reader import HFSource
from .mapping import KEY, VALUE, Entry, entries, sla_of
from .output import finished_folder
from .progress import progress
from .source import Source
from .weight_files import read_json

#: Of a folder, what is written anew or in another place, or is of the weights as they were.
_NOT_COPIED = (
    *("config.json", "sla_convert.json", "model*.safetensors*", "pytorch_model*.bin*", "optimizer.*", ".*"),
    OLD_PADDING_FILE,
)


class WithLiveRows:
    """A source that has all K/V rows, seen as a model that has those of the groups that it projects; else the same.

    Args:
        source: the weights.
        config: the model's fields of ``config.json``.
    """

    args: Namespace | None

    def __init__(self, source: Source, config: Mapping[str, Any]) -> None:
        self._source, self.path, self.args = source, source.path, source.args
        self.config: Mapping[str, Any] = config
        self._of = {entry.hf: entry for entry in entries(config) if entry.part in (KEY, VALUE)}

    def dtype(self, name: str) -> torch.dtype:
        """The source's."""
        return self._source.dtype(name)

    def get(self, name: str) -> Tensor:
        """The source's tensor; of keys and values, the rows of projected groups."""
        tensor = self._source.get(name)
        return live_rows(tensor, self.config, self._of[name]) if name in self._of else tensor

    def parts(self, name: str) -> Sequence[Tensor]:
        """Likewise."""
        return [self.get(name)] if name in self._of else self._source.parts(name)

    def padding(self, name: str) -> Tensor | None:
        """The source's."""
        return self._source.padding(name)


class Pruned(WithLiveRows):
    """A ``full`` skip-layer source, seen as the ``pruned`` model that computes the same.

    Raises:
        ConvertError: if ``full`` is dense, or pruned already.
    """

    def __init__(self, full: Source) -> None:
        if sla_of(full.config).is_dense:
            raise ConvertError(f"{full.path}: a dense model: expected one with skip-layer attention")
        if full.config["sla_kv_projection"] == "pruned":
            raise ConvertError(f"{full.path}: pruned already: expected sla_kv_projection full")
        super().__init__(full, dict(full.config) | {"sla_kv_projection": "pruned"})


def live_rows(tensor: Tensor, config: Mapping[str, Any], entry: Entry) -> Tensor:
    """Of a K or V weight or bias with the rows of all groups, those of the groups that ``config`` projects there.

    Args:
        tensor: ``[groups * head_dim, ..]``.
        config: the fields of ``config.json``.
        entry: the tensor in a model of ``config``.
    """
    groups = tensor.unflatten(0, (config["num_key_value_heads"], config["head_dim"]))
    return groups[list(sla_of(config).projected_groups(entry.layer + 1, entry.part))].flatten(0, 1)


def prune(folder: Path, out: Path, dtype: torch.dtype | None, max_shard_bytes: int, overwrite: bool) -> str:
    """Write the export in ``folder`` without its dead rows; the other files come along.  Returns what was left out.

    Memory: one tensor.

    Raises:
        ConvertError: for a folder that holds no ``full`` skip-layer export.
    """
    full = HFSource(folder)
    if full.kind != MODEL_TYPE:
        raise ConvertError(f"{folder}: model_type {full.kind}: expected {MODEL_TYPE}, an export")
    source = Pruned(full)
    before, infos = (
        [TensorInfo(entry.hf, dtype or full.dtype(entry.hf), entry.shape) for entry in entries(config)]
        for config in (full.config, source.config)
    )
    sizes = [sum(info.num_bytes for info in infos) for infos in (before, infos)]
    with finished_folder(out, overwrite, [folder]) as place, progress(out, place, sizes[1]):
        write_weights(place, infos, source.parts, max_shard_bytes)
        for path in sorted(folder.iterdir()):
            if path.name in CODE_FILES or any(fnmatch(path.name, pattern) for pattern in _NOT_COPIED):
                continue
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, place / path.name)
        if padding_file(folder) == folder / OLD_PADDING_FILE:
            (place / PADDING_FILE).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / OLD_PADDING_FILE, place / PADDING_FILE)
        config = read_json(folder / "config.json") | {"sla_kv_projection": "pruned"}
        write_json(place / "config.json", config | rope_parameters(full.config) | model_kind(infos[0].dtype))
        write_code(place)
    return f"{sizes[1] / 1e6:.1f} MB of weights, {(sizes[0] - sizes[1]) / 1e6:.1f} MB that nobody reads left out"
