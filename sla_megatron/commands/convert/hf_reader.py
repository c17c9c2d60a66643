"""Read a Hugging Face folder: our own export, or a dense Llama-family or GPT-2 model, under our format's names."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...attention.sla_config import evenly_spread
from ...common.errors import last_line
from .architecture import MODEL_TYPE, Config
from .errors import ConvertError
from .foreign import FOREIGN, Foreign
from .hf_folder import padding_file
from .mapping import entries, sla_of
from .weight_files import WeightFiles, read_json

# What describes a model of our format, of all that a config.json holds.
_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "normalization", "norm_eps"),
    *("norm_zero_centered", "position_embedding_type", "rope_theta", "rotary_percent", "rotary_interleaved"),
    *("rope_scaling", "attention_bias", "attention_output_bias", "mlp_bias", "gated_mlp", "qk_layernorm"),
    *("tie_word_embeddings", "sla_skip_distances", "sla_source_layers", "sla_skip_groups", "sla_layers", "sla_share"),
    "sla_kv_projection",
)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class HFSource:
    """A :class:`~sla_megatron.commands.convert.source.Source` on a folder of safetensors, or of ``torch.save``'s files.

    Raises:
        ConvertError: for another architecture, or if the folder's tensors are not those that its ``config.json``
            describes.
    """

    args: Namespace | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        # transformers would add an adapter to the weights beside it.
        if (path / "adapter_config.json").is_file():
            raise ConvertError(f"{path} holds an adapter (adapter_config.json): merge it into its model, and save that")
        config, self._foreign = _architecture(path)
        self.config: Mapping[str, Any] = config
        self._files = WeightFiles(path)
        self._names = self._files.names()
        self._entries = {entry.hf: entry for entry in entries(config)}
        self._check()

    @property
    def kind(self) -> str:
        """The folder's ``model_type``."""
        return MODEL_TYPE if self._foreign is None else self._foreign.kind

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._files.dtype(self._stored_name(name))

    def get(self, name: str) -> Tensor:
        """The tensor, read from its file."""
        tensor = self._files.get(self._stored_name(name))
        return tensor if self._foreign is None else self._foreign.tensor(name, tensor).contiguous()

    def parts(self, name: str) -> Sequence[Tensor]:
        """The tensor as a whole."""
        return [self.get(name)]

    def padding(self, name: str) -> Tensor | None:
        """The rows that an export cut, where it kept them beside the model."""
        path = padding_file(self.path)
        if path is None:
            return None
        with safe_open(path, "pt") as file:
            return file.get_tensor(name) if name in file.keys() else None

    def _stored_name(self, name: str) -> str:
        """The name in the files of what is ``name`` in our format; the first of its names if none of them is there."""
        names = (name,) if self._foreign is None else self._foreign.names(name)
        if name == _EMBEDDING and self.config["tie_word_embeddings"]:
            # Either of the two may have been saved.
            names = (*names, _HEAD)
        return next((stored for stored in names if stored in self._names), names[0])

    def _check(self) -> None:
        known = set()
        for name, entry in self._entries.items():
            stored = self._stored_name(name)
            known.add(stored)
            if stored not in self._names:
                raise ConvertError(f"{self.path}: tensor {stored} ({name}) is missing")
            shape = self._files.shape(stored)
            expected = entry.shape if self._foreign is None else self._foreign.stored_shape(name, entry.shape)
            if shape != expected:
                raise ConvertError(f"{self.path}: tensor {stored} has shape {shape}, {name} needs {expected}")
            if self._files.dtype(stored) not in _TYPES:
                kind = str(self._files.dtype(stored)).removeprefix("torch.")
                raise ConvertError(f"{self.path}: tensor {stored} is stored as {kind}: expected floating point numbers")
        if self.config["tie_word_embeddings"] and _HEAD in self._names:
            self._require_tied()
            known.add(_HEAD)
        ignored = () if self._foreign is None else self._foreign.ignored
        for stored in sorted(self._names - known):
            if not stored.endswith(ignored):
                raise ConvertError(f"{self.path}: tensor {stored} is not part of this architecture")

    def _require_tied(self) -> None:
        """Many published models hold a copy of the embeddings as ``lm_head``; merging an adapter may have changed it.

        Of what then counts, versions of transformers think differently.
        """
        embedding = self._stored_name(_EMBEDDING)
        first, second = self._files.get(embedding), self._files.get(_HEAD)
        wide = torch.promote_types(first.dtype, second.dtype)
        if first.shape != second.shape or not torch.equal(first.to(wide), second.to(wide)):
            raise ConvertError(
                f"{self.path}: config.json ties the embeddings (tie_word_embeddings), but {_HEAD} differs from "
                f"{embedding}: set tie_word_embeddings to false in config.json to keep it, or delete it from the file"
            )


def _architecture(path: Path) -> tuple[Mapping[str, Any], Foreign | None]:
    """The fields of our format, and how tensors of another architecture are seen as ours."""
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    if kind == MODEL_TYPE:
        return _ours(config, path), None
    if kind not in FOREIGN:
        raise ConvertError(f"{path}: model_type {kind}: expected {MODEL_TYPE}, {', '.join(FOREIGN)}")
    theirs = _foreign_config(path)
    try:
        ours = FOREIGN[kind].config(theirs)
    except ConvertError as error:
        raise ConvertError(f"{path / 'config.json'}: {error}") from error
    _complete(ours, path)
    return ours, FOREIGN[kind]


def _ours(config: Mapping[str, Any], path: Path) -> Config:
    """A configuration of our format, with the defaults that transformers leaves out when it saves one."""
    complete = _complete(config, path)
    _refuse_quantised(config, path)
    fields = complete.to_dict()
    found = dict(config) | {name: fields.get(name) for name in _FIELDS}
    groups = found["num_key_value_heads"]
    if tuple(found["sla_skip_groups"]) != evenly_spread(len(found["sla_skip_groups"]), groups):
        raise ConvertError(f"{path}: sla_skip_groups {found['sla_skip_groups']} are not spread evenly")
    sla_of(found)
    return found


def _complete(config: Mapping[str, Any], path: Path) -> Any:
    """The format's own object of ``config``.  Raises ``ConvertError`` for values outside of their ranges."""
    from ...hf.configuration_sla_gpt import SlaGPTConfig

    try:
        return SlaGPTConfig.from_dict(dict(config))
    except Exception as error:  # transformers' own checks have no common class.
        raise ConvertError(f"{path / 'config.json'}: {last_line(error).strip()}") from error


def _foreign_config(folder: Path) -> Config:
    """The fields of ``config.json`` and transformers' defaults for all others, whichever version wrote the file.

    Raises:
        ConvertError: for what transformers refuses, or for weights that are quantised.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        theirs = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except Exception as error:  # Of many kinds, and strict ones of no common class.
        raise ConvertError(f"{folder / 'config.json'} cannot be read: {last_line(error).strip()}") from error
    finally:
        logging.set_verbosity(level)
    _refuse_quantised(theirs, folder)
    return theirs


def _refuse_quantised(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ``ConvertError`` for weights that are not numbers of floating point."""
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "of some kind")
        raise ConvertError(f"{folder}: quantization_config ({method}): expected weights that are not quantised")
