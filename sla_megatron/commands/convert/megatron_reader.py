"""Read a torch_dist checkpoint a slice at a time, whatever it was sharded over.  One process, no process group.

Megatron's own loader builds every tensor of the model at once, for the ranks that it runs on.  The files are those of
``torch.distributed.checkpoint``: what lies in them as usual is mapped where it is, and its own reader is asked for the
rest, one layer of one tensor at a time.
"""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ...common.checkpoint_folders import TRACKER
from ...common.errors import last_line
from .architecture import config_from_args
from .errors import ConvertError
from .mapping import KEY, QUERY, UP, VALUE, VOCABULARY, Entry, entries, qkv_rows
from .stored_arguments import require_understood
from .stored_items import UnfamiliarError, read_tensor
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
        self._kept: dict[tuple[str, int | None], list[tuple[tuple[int, ...], Tensor]]] = {}
        self._check()

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        entry = self._entries[name]
        return self._stored[self._key(entry)[0]].properties.dtype

    def get(self, name: str) -> Tensor:
        """The tensor, read from the checkpoint's shards."""
        return _joined(self.parts(name), self.dtype(name), self._entries[name].shape)

    def parts(self, name: str) -> Sequence[Tensor]:
        """The tensor's rows where they lie: of queries, keys and values a part for each group."""
        entry = self._entries[name]
        place, rows = self._key(entry), [(0, entry.shape[0])]
        if entry.part in (QUERY, KEY, VALUE):
            rows = qkv_rows(self.config, entry.layer)[entry.part]
        elif entry.part == UP:
            rows = [(entry.shape[0], entry.shape[0])]
        return [part for start, length in rows for part in self._rows(place, start, length)]

    def padding(self, name: str) -> Tensor | None:
        """The vocabulary rows that were cut from ``name``."""
        entry = self._entries[name]
        (key, layer), kept = self._key(entry), entry.shape[0]
        rows, columns = self._stored[key].size
        return _joined(self._rows((key, layer), kept, rows - kept), self.dtype(name), (rows - kept, columns))

    def _key(self, entry: Entry) -> tuple[str, int | None]:
        """The checkpoint's key, and which layer of it: layers of one shape are stored as one tensor."""
        return self._keys.place(entry.megatron, entry.layer, self._stored)

    def _rows(self, place: tuple[str, int | None], start: int, length: int) -> list[Tensor]:
        """Rows of what is stored at ``place`` (key, layer): views of the files, or of shards of columns one copy."""
        key, layer = place
        shape = (length, *self._stored[key].size[1 + (layer is not None) :])
        found = []
        for offsets, data in self._chunks(place):
            begin, end = max(start, offsets[0]), min(start + length, offsets[0] + len(data))
            if begin < end:
                found.append(((begin - start, *offsets[1:]), data[begin - offsets[0] : end - offsets[0]]))
        parts = [part for _, part in found]
        if all(part.shape[1:] == shape[1:] for part in parts):
            ends = [0, *accumulate(map(len, parts))]
            if [at[0] for at, _ in found] == ends[:-1] and ends[-1] == length:
                return parts
        if sum(part.numel() for part in parts) != torch.Size(shape).numel():
            raise ConvertError(f"{self.path}: the shards of {key} overlap")
        target = torch.empty(shape, dtype=self._stored[key].properties.dtype)
        for offsets, part in found:
            target[tuple(slice(at, at + size) for at, size in zip(offsets, part.shape, strict=True))] = part
        return [target]

    def _chunks(self, place: tuple[str, int | None]) -> list[tuple[tuple[int, ...], Tensor]]:
        """Where each shard of what is stored at ``place`` begins, and its data."""
        if place not in self._kept:
            try:
                found = list(self._mapped(*place))
            except (UnfamiliarError, OSError, KeyError, ValueError):
                # torch can read it, or say what is wrong.
                found = [self._whole(*place)]
            self._kept[place] = sorted(found, key=lambda chunk: chunk[0])
            # Its parts are asked for in turn, those of a weight and of its bias.
            if len(self._kept) > 2:
                del self._kept[next(iter(self._kept))]
        return self._kept[place]

    def _mapped(self, key: str, layer: int | None) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        stored, written = self._stored[key], self._reader.read_metadata().storage_data
        for chunk in stored.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if not chunk.sizes.numel() or (layer is not None and not offsets[0] <= layer < offsets[0] + sizes[0]):
                continue
            item = written[MetadataIndex(key, chunk.offsets)]
            if getattr(item, "transform_descriptors", None):
                raise UnfamiliarError(f"{key} is compressed")
            data = read_tensor(self.path / item.relative_path, item.offset, item.length)
            if tuple(data.shape) != sizes or data.dtype != stored.properties.dtype:
                raise UnfamiliarError(f"{key} has another shape")
            yield (offsets, data) if layer is None else (offsets[1:], data[layer - offsets[0]])

    def _whole(self, key: str, layer: int | None) -> tuple[tuple[int, ...], Tensor]:
        """As if it were one shard."""
        size = tuple(self._stored[key].size)
        if layer is None:
            return (0,) * len(size), self._read(key, (0,) * len(size), size)
        rest = size[1:]
        return (0,) * len(rest), self._read(key, (layer, *(0,) * len(rest)), (1, *rest))[0]

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


def _joined(parts: Sequence[Tensor], dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """``parts``, one after the other, in memory of their own."""
    return torch.cat([torch.empty(0, *shape[1:], dtype=dtype), *parts])


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
