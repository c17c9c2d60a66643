"""Read a torch_dist checkpoint a slice at a time, whatever it was sharded over.  One process, no process group.

Megatron's own loader builds every tensor of the model at once, for the ranks that it runs on.  The files are those of
``torch.distributed.checkpoint``, whose reader is used here for one layer of one tensor at a time.
"""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ...common.checkpoint_folders import TRACKER
from ...common.errors import last_line
from .architecture import config_from_args
from .errors import ConvertError
from .mapping import GATE, KEY, QUERY, UP, VALUE, VOCABULARY, Entry, entries, qkv_rows
from .stored_arguments import require_understood
from .stored_keys import StoredKeys

#: How the keys of layers that predict further tokens begin.
_FURTHER = "mtp."

#: Keys of a checkpoint that hold no weights of the model.
_NO_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state_machine", "common_state", "opt_param_scheduler")


def checkpoint_folder(path: Path) -> Path:
    """The folder of one iteration: ``path`` itself, or what the tracker file in ``path`` names.

    Raises:
        ConvertError: where there is no complete torch_dist checkpoint.
    """
    tracker = path / TRACKER
    if tracker.exists():
        step = tracker.read_text().strip()
        path = path / ("release" if step == "release" else f"iter_{int(step):07d}" if step.isdigit() else step)
    if not path.is_dir():
        raise ConvertError(f"{path}: no such checkpoint folder")
    if not (path / ".metadata").exists() or not (path / "metadata.json").exists():
        raise ConvertError(f"{path}: no torch_dist checkpoint (.metadata, metadata.json), or not a complete one")
    return path


class _Reader(FileSystemReader):
    """Reads the metadata once: it lists every shard of weights and optimizer."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata()
        return self._metadata


class _Slice(LoadPlanner):
    """Asks for one box of one tensor."""

    def __init__(self, name: str, offsets: tuple[int, ...], target: Tensor) -> None:
        self.name, self.offsets, self.target = name, torch.Size(offsets), target

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        box = ChunkStorageMetadata(self.offsets, self.target.size())
        stored = self.metadata.state_dict_metadata[self.name]
        return LoadPlan(create_read_items_for_chunk_list(self.name, stored, [box]))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError(read_item)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        found = self.target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            found = found.narrow(dim, offset, length)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class MegatronSource:
    """A :class:`~sla_megatron.commands.convert.source.Source` on a torch_dist checkpoint.

    Args:
        folder: of one iteration (:func:`checkpoint_folder`).
        args: its arguments, with any that are overridden.
        vocab_size: rows of the vocabulary that are not padding.
        drop_mtp: whether layers that predict further tokens are passed over; the model of ``args`` still has them.

    Raises:
        ConvertError: for arguments that the format has no field for; or if the checkpoint's tensors are not those that
            its arguments describe: one missing, unknown or of another shape is named.
    """

    def __init__(self, folder: Path, args: Namespace, vocab_size: int, drop_mtp: bool = False) -> None:
        self.path, self.args = folder, args
        require_understood(Namespace(**vars(args) | {"mtp_num_layers": None}) if drop_mtp else args)
        self.config: Mapping[str, Any] = config_from_args(args, vocab_size)
        self._keys = StoredKeys(args)
        self._reader = _Reader(folder)
        passed_over = _FURTHER if drop_mtp else ()
        stored = stored_tensors(folder, self._reader)
        self._stored = {key: tensor for key, tensor in stored.items() if not key.startswith(passed_over)}
        self._entries = {entry.hf: entry for entry in entries(self.config)}
        self._last: tuple[tuple[str, int | None], Tensor] | None = None
        self._check()

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        entry = self._entries[name]
        return self._stored[self._key(entry)[0]].properties.dtype

    def get(self, name: str) -> Tensor:
        """The tensor, read from the checkpoint's shards."""
        entry = self._entries[name]
        if entry.part == VOCABULARY:
            return self._read(self._key(entry)[0], (0, 0), entry.shape)
        whole = self._whole(entry)
        if entry.part in (QUERY, KEY, VALUE):
            rows = qkv_rows(self.config, entry.layer)[entry.part]
            return torch.cat([whole[start : start + length] for start, length in rows])
        if entry.part in (GATE, UP):
            return whole.chunk(2)[entry.part == UP].contiguous()
        return whole

    def padding(self, name: str) -> Tensor | None:
        """The vocabulary rows that were cut from ``name``."""
        entry = self._entries[name]
        key, kept = self._key(entry)[0], entry.shape[0]
        rows, columns = self._stored[key].size
        return self._read(key, (kept, 0), (rows - kept, columns))

    def _key(self, entry: Entry) -> tuple[str, int | None]:
        """The checkpoint's key, and which layer of it: layers of one shape are stored as one tensor."""
        return self._keys.place(entry.megatron, entry.layer, self._stored)

    def _whole(self, entry: Entry) -> Tensor:
        """The Megatron tensor that ``entry`` is part of; the last one is kept: its parts are asked for in turn."""
        at = self._key(entry)
        if self._last is None or self._last[0] != at:
            key, layer = at
            size = tuple(self._stored[key].size)
            if layer is None:
                tensor = self._read(key, (0,) * len(size), size)
            else:
                tensor = self._read(key, (layer, *(0,) * (len(size) - 1)), (1, *size[1:]))[0]
            self._last = (at, tensor)
        return self._last[1]

    def _read(self, key: str, offsets: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        target = torch.empty(size, dtype=self._stored[key].properties.dtype)
        if target.numel() == 0:
            return target
        try:
            # It warns that it runs in one process, which is what it is asked to do.
            with catch_warnings(action="ignore"):
                load({}, storage_reader=self._reader, planner=_Slice(key, offsets, target), no_dist=True)
        except (Exception, CheckpointException) as error:
            # torch wraps what an unreadable file raises in one of its own, of many lines, which is no Exception.
            raise ConvertError(f"{self.path}: {key} cannot be read: {last_line(error)}") from error
        return target

    def _check(self) -> None:
        """Each tensor is there, with the shape that the arguments say, and there is no other."""
        for key, stored in self._stored.items():
            held = sum(chunk.sizes.numel() for chunk in stored.chunks)
            if held != stored.size.numel():
                raise ConvertError(f"{self.path}: the shards of {key} hold {held} of {stored.size.numel()} elements")
        known = set()
        sizes: dict[tuple[str, int | None], int] = {}
        for entry in self._entries.values():
            key, layer = self._key(entry)
            if key not in self._stored:
                raise ConvertError(f"{self.path}: tensor {key} ({entry.hf}) is missing")
            known.add(key)
            rows, *rest = tuple(self._stored[key].size)[layer is not None :]
            if tuple(rest) != entry.shape[1:] or (entry.part == VOCABULARY and rows < entry.shape[0]):
                raise ConvertError(f"{self.path}: tensor {key} has shape {[rows, *rest]}, {entry.hf} is {entry.shape}")
            sizes[key, layer] = sizes.get((key, layer), 0) + entry.shape[0]
            if layer is not None and self._stored[key].size[0] != self.config["num_hidden_layers"]:
                raise ConvertError(f"{self.path}: tensor {key} holds {self._stored[key].size[0]} layers")
        for entry in self._entries.values():
            key, layer = self._key(entry)
            rows = self._stored[key].size[layer is not None]
            if entry.part != VOCABULARY and sizes[key, layer] != rows:
                raise ConvertError(f"{self.path}: tensor {key} has {rows} rows, its parts {sizes[key, layer]}")
        unknown = sorted(set(self._stored) - known)
        if unknown:
            raise ConvertError(f"{self.path}: tensor {unknown[0]} is not part of this architecture")


def stored_tensors(folder: Path, reader: FileSystemReader | None = None) -> dict[str, TensorStorageMetadata]:
    """The model's tensors in a checkpoint, by key.  Raises ``ConvertError`` for metadata that cannot be read."""
    found = stored_metadata(folder, reader).items()
    return {key: stored for key, stored in found if isinstance(stored, TensorStorageMetadata)}


def stored_metadata(folder: Path, reader: FileSystemReader | None = None) -> dict[str, Any]:
    """Likewise, of tensors and of whatever else is stored of a model."""
    try:
        metadata = (reader or FileSystemReader(folder)).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, ValueError) as error:
        raise ConvertError(f"{folder / '.metadata'} cannot be read: {last_line(error)}") from error
    return {key: stored for key, stored in metadata.state_dict_metadata.items() if not key.startswith(_NO_WEIGHTS)}
