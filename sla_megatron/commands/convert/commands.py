"""What ``sla-convert`` does: each command reads one model and writes, or compares, another."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...attention.sla_config import compact_ranges, default_num_skip_groups, default_skip_distance, evenly_spread
from ...common.tokenizers import (
    DEFAULTS,
    MODEL_PATHS,
    TOKENIZER_FILES,
    TOKENIZER_PATHS,
    TokenizerError,
    build,
    carry_files,
    token_count,
    tokenizer_settings,
)
from ...flags.skipping import parse_layers
from .architecture import MODEL_TYPE, argv_from_config
from .checkpoint_arguments import export_args, whole
from .checkpoint_arguments import stored_args as stored_args
from .errors import ConvertError
from .foreign import FOREIGN
from .hf_folder import TensorInfo, write_model_files, write_padding, write_weights
from .hf_reader import HFSource
from .mapping import KEY, VALUE, VOCABULARY, entries, sla_of
from .megatron_reader import MegatronSource, checkpoint_folder
from .megatron_writer import RELEASE, write_megatron
from .output import finished_folder
from .progress import progress
from .prune import live_rows
from .source import Source
from .stored_keys import StoredKeys
from .to_foreign import AsForeign, carry, chosen, exported_as
from .tokenizer import vocabulary_size, with_model
from .tokenizer_place import placed
from .weight_files import read_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_GIB = 2**30


def open_megatron(
    path: Path,
    tokenizer_model: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    drop_mtp: bool = False,
) -> Source:
    """A checkpoint (a ``--save`` folder, or one iteration of it) by its own arguments.

    Args:
        path: the folder.
        tokenizer_model: where the tokenizer's model is, if it is not where :func:`placed` looks.
        overrides: arguments that replace the stored ones.
        drop_mtp: whether layers that predict further tokens are left out, rather than refused.
    """
    folder = checkpoint_folder(path)
    args = export_args(folder)
    for name, value in (overrides or {}).items():
        if not hasattr(args, name) and not hasattr(args := whole(args), name):
            raise ConvertError(f"--override {name}: neither Megatron nor the checkpoint has an argument of that name")
        setattr(args, name, value)
    tried: list[str] = []
    if tokenizer_model is None and not {"tokenizer_type", *MODEL_PATHS} & set(overrides or {}):
        args, tried = placed(args, folder)
    try:
        args = with_model(args, tokenizer_model)
        size = vocabulary_size(args)
    except TokenizerError as error:
        raise ConvertError(f"{error}{'; tried ' if tried else ''}{', '.join(tried)}") from error
    return MegatronSource(folder, args, size, drop_mtp)


def megatron_to_hf(
    source: Source,
    out: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * _GIB,
    overwrite: bool = False,
    special_as_text: bool = False,
    kind: str | None = None,
) -> str:
    """Write ``source`` as a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load; returns what was carried.

    ``kind`` is the folder's ``model_type``, such as ``llama``; without, the one of :func:`to_foreign.chosen`.
    Memory, beside the libraries and mapped files: nothing but one tensor, where it changes its type, or was sharded by
    columns.
    """
    itself = chosen(source, kind)
    with finished_folder(out, overwrite, _read_by(source)) as folder:
        # First: what cannot be carried is known before hours of writing, and may decide the kind.
        kind, carried = carry(source, folder, itself, kind is not None, special_as_text)
        foreign = None if kind == MODEL_TYPE else AsForeign(source, kind)
        infos = _infos(source, dtype) if foreign is None else foreign.infos(dtype)
        with progress(out, folder, sum(info.num_bytes for info in infos)):
            write_weights(folder, infos, (foreign or source).parts, max_shard_bytes)
        # The rows by which Megatron pads a vocabulary's tensors.
        padding = {entry.hf: source.padding(entry.hf) for entry in entries(source.config) if entry.part == VOCABULARY}
        padding = {name: rows for name, rows in padding.items() if rows is not None}
        cut = [TensorInfo(name, dtype or rows.dtype, tuple(rows.shape)) for name, rows in padding.items()]
        write_padding(folder, cut, padding.__getitem__)
        special = _special_ids(folder)
        if foreign is None:
            write_model_files(folder, source.config, infos[0].dtype, special)
        else:
            foreign.write_model_files(folder, infos[0].dtype, special)
    return carried


def _infos(source: Source, dtype: torch.dtype | None) -> list[TensorInfo]:
    return [
        TensorInfo(entry.hf, dtype or source.dtype(entry.hf), entry.shape)
        for entry in entries(source.config)
        if torch.Size(entry.shape).numel()
    ]


def _read_by(source: Source) -> list[Path]:
    """Files and folders that a conversion of ``source`` reads."""
    named = [getattr(source.args, name, None) for name in TOKENIZER_PATHS]
    return [source.path, *(Path(name) for name in named if name)]


def _special_ids(folder: Path) -> dict[str, Any]:
    """The token ids that ``generate`` needs, from the tokenizer that was carried along."""
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if (folder / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = {name: getattr(tokenizer, name) for name in ids}
    return ids


def hf_to_megatron(
    source: Source, out: Path, dtype: torch.dtype | None = None, overwrite: bool = False, flags: Sequence[str] = ()
) -> None:
    """Write ``source`` as a checkpoint that Megatron's ``--load`` starts from, at iteration 0, without optimizer."""
    stored = dtype or _widest(source)
    # What Megatron has no flag for is refused before anything else is loaded.
    argv_from_config(source.config)
    settings, tokenizer = _tokenizer_of(source)
    total = sum(torch.Size(entry.shape).numel() for entry in entries(source.config)) * stored.itemsize
    with finished_folder(out, overwrite, _read_by(source)) as folder, progress(out, folder, total):
        write_megatron(source, folder, stored, settings, flags)
        carry_files(settings, tokenizer, folder / RELEASE)


def _widest(source: Source) -> torch.dtype:
    """The type that holds every tensor of ``source`` as it is: a Megatron model has one."""
    widest = reduce(torch.promote_types, {source.dtype(entry.hf) for entry in entries(source.config)})
    if widest not in DTYPES.values():
        kind = str(widest).removeprefix("torch.")
        raise ConvertError(f"{source.path}: weights are stored as {kind}: --dtype {', '.join(DTYPES)}")
    return widest


def _tokenizer_of(source: Source) -> tuple[Namespace, Any]:
    """The settings of the tokenizer that goes with the weights, and what Megatron makes of them.

    Raises:
        ConvertError: if it has more tokens than the model.
    """
    size = source.config["vocab_size"]
    if source.args is not None:
        settings = Namespace(**tokenizer_settings(source.args))
    elif any((source.path / name).is_file() for name in TOKENIZER_FILES):
        # transformers asks before it reads a folder that holds code, though our tokenizers need none of it.
        is_ours = read_json(source.path / "config.json").get("model_type") == MODEL_TYPE
        settings = Namespace(
            **DEFAULTS
            | {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(source.path.absolute())}
            | {"trust_remote_code": is_ours and bool(list(source.path.glob("*.py"))), "vocab_size": size}
        )
    else:
        settings = Namespace(**DEFAULTS | {"tokenizer_type": "NullTokenizer", "vocab_size": size})
    if settings.tokenizer_type != "HuggingFaceTokenizer":
        return settings, None
    try:
        tokenizer = build(settings)
    except TokenizerError as error:
        # The weights are what was asked for.
        print(f"sla-convert: the tokenizer is not carried along: {error}", file=sys.stderr)
        return settings, None
    highest = token_count(tokenizer) - 1
    if highest >= size:
        raise ConvertError(
            f"{source.path}: its tokenizer has a token {highest}, the model's vocabulary is {size} (0 to {size - 1}): "
            "resize the model's embeddings, or take the added tokens out of the tokenizer"
        )
    return settings, tokenizer


class WithSLA:
    """A dense source, seen as a skip-layer model of the same weights: a start for continued pretraining.

    Args:
        dense: the source.
        distances, num_skip_groups, layers, kv_projection: as the ``--sla`` flags; ``None`` takes their defaults.

    Raises:
        ConvertError: if ``dense`` is not dense.
    """

    def __init__(
        self,
        dense: Source,
        distances: Sequence[int] | None = None,
        num_skip_groups: int | None = None,
        layers: str | None = None,
        kv_projection: str | None = None,
    ) -> None:
        if dense.config["sla_skip_distances"]:
            raise ConvertError(f"{dense.path}: it is a skip-layer model already")
        groups, count = dense.config["num_key_value_heads"], dense.config["num_hidden_layers"]
        skipping = default_num_skip_groups(groups) if num_skip_groups is None else num_skip_groups
        if not 0 <= skipping <= groups:
            raise ConvertError(f"--sla-num-skip-groups {skipping}: expected an integer from 0 to {groups}")
        chosen = dense.config | {
            "sla_skip_distances": list(distances or [default_skip_distance(count)]),
            "sla_skip_groups": list(evenly_spread(skipping, groups)),
            "sla_layers": list(parse_layers(layers, count) if layers else range(1, count + 1)),
            "sla_kv_projection": kv_projection or "full",
        }
        try:
            sla = sla_of(chosen)
        except ValueError as error:
            raise ConvertError(str(error)) from error
        self.dense, self.path, self.args = dense, dense.path, dense.args
        self.config = chosen | {"sla_layers": list(sla.consumer_layers)}
        self._entries = {entry.hf: entry for entry in entries(self.config)}

    def dtype(self, name: str) -> torch.dtype:
        """The dense tensor's."""
        return self.dense.dtype(name)

    def get(self, name: str) -> Tensor:
        """The dense tensor; of a pruned model's keys and values, the rows of live groups."""
        tensor, entry = self.dense.get(name), self._entries[name]
        if entry.part not in (KEY, VALUE):
            return tensor
        return live_rows(tensor, self.config, entry)

    def parts(self, name: str) -> Sequence[Tensor]:
        """Likewise."""
        return [self.get(name)] if self._entries[name].part in (KEY, VALUE) else self.dense.parts(name)

    def padding(self, name: str) -> Tensor | None:
        """The dense model's."""
        return self.dense.padding(name)


def describe(source: Source) -> str:
    """The architecture, and the table by which every tensor is converted."""
    config, sla = source.config, sla_of(source.config)
    # Of a checkpoint, what it is exported as.
    kind = source.kind if isinstance(source, HFSource) else chosen(source)
    lines = [f"{source.path}"]
    if not isinstance(source, HFSource):
        lines.append(f"  exported as: {exported_as(source, kind)}")
    config = config | {"model_type": kind}
    lines += [f"  {name}: {value}" for name, value in config.items() if not name.startswith("sla_")]
    skipping = "dense" if sla.is_dense else f"{sla.origin()}, {sla.pattern()}"
    lines.append(f"  skip-layer attention: {skipping}, layers {compact_ranges(sla.consumer_layers) or 'none'}")
    rows = list(entries(config))
    names = {entry.hf: FOREIGN[kind].names(entry.hf)[0] if kind in FOREIGN else entry.hf for entry in rows}
    width = max(map(len, names.values()))
    keys = StoredKeys(source.args or Namespace())
    for entry in rows:
        # Of a GPT, as if it held all layers as one tensor.
        key, layer = keys.place(entry.megatron, entry.layer, (entry.megatron,))
        where = key if layer is None else f"{key} [{layer}]"
        shape = "x".join(map(str, entry.shape))
        lines.append(f"{names[entry.hf]:{width}}  {shape:>14}  {entry.part:10}  {where}")
    return "\n".join(lines)
