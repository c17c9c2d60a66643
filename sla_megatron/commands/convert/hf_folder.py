"""Hugging Face folders: sharded safetensors, written a tensor at a time; the files that make them loadable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from .architecture import rope_parameters, written
from .errors import ConvertError

_HF_CODE = Path(__file__).parents[2] / "hf"
CODE_FILES = tuple(sorted(path.name for path in _HF_CODE.glob("*_sla_gpt.py")))

#: The vocabulary rows that Megatron padded, which the format cuts, so that they can come back.  Not beside the model:
#: engines (vLLM) read every ``*.safetensors`` there as weights.
PADDING_FILE = "megatron/padding.safetensors"
#: Where exports had it at first.
OLD_PADDING_FILE = "megatron_padding.safetensors"

_TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


@dataclass(frozen=True)
class TensorInfo:
    """Name, type and shape of a tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


#: A tensor by its name, or its parts: rows of it, one part after the other.
Get = Callable[[str], Tensor | Sequence[Tensor]]


def write_safetensors(path: Path, infos: Iterable[TensorInfo], get: Get) -> None:
    """Write one file, holding one tensor at a time, each part straight from where it lies.

    The format's own library takes all tensors of a file at once, and copies them.
    """
    infos, header, offset = list(infos), {}, 0
    for info in infos:
        header[info.name] = {
            "dtype": _TYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.num_bytes],
        }
        offset += info.num_bytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    # Without a buffer: nothing is copied on its way, and what cannot be read any more raises.
    with path.open("wb", buffering=0) as file:
        _write(file, len(text).to_bytes(8, "little") + text)
        for info in infos:
            found = get(info.name)
            parts = [found] if isinstance(found, Tensor) else found
            shape = (sum(map(len, parts)), *parts[0].shape[1:])
            if shape != info.shape or any(part.shape[1:] != info.shape[1:] for part in parts):
                raise ConvertError(f"tensor {info.name} has shape {shape}, expected {info.shape}")
            for part in parts:
                if part.dtype != info.dtype:
                    # Of a view that may lie anywhere.
                    part = part.clone().to(info.dtype)
                _write(file, part.contiguous().reshape(-1).view(torch.uint8).numpy())


def _write(file: RawIOBase, content: bytes | numpy.ndarray) -> None:
    """All of it: a system writes no more than 2 GiB at once."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def write_padding(folder: Path, infos: Iterable[TensorInfo], get: Get) -> None:
    """The rows that were cut from the vocabulary's tensors; ``infos`` may be empty: none were."""
    path = folder / PADDING_FILE
    path.parent.mkdir()
    write_safetensors(path, infos, get)


def padding_file(folder: Path) -> Path | None:
    """What :func:`write_padding` wrote, now or at first; ``None`` if nothing did."""
    return next((folder / name for name in (PADDING_FILE, OLD_PADDING_FILE) if (folder / name).exists()), None)


def split_into_shards(infos: Iterable[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Neighbouring tensors together, as many as fit; one that does not fit at all is alone."""
    shards: list[list[TensorInfo]] = []
    size = 0
    for info in infos:
        if not shards or size + info.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.num_bytes
    return shards


def write_weights(folder: Path, infos: Iterable[TensorInfo], get: Get, max_shard_bytes: int) -> None:
    """``model.safetensors``, or ``model-00001-of-0000N.safetensors`` and their index."""
    shards = split_into_shards(infos, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], get)
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, get)
    index = {
        "metadata": {"total_size": sum(info.num_bytes for shard in shards for info in shard)},
        "weight_map": {info.name: name for name, shard in zip(names, shards, strict=True) for info in shard},
    }
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented, with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def model_kind(dtype: torch.dtype) -> dict[str, Any]:
    """The fields of ``config.json`` by which transformers finds the model's code, and its type."""
    module = "modeling_sla_gpt"
    auto_map = {
        "AutoConfig": "configuration_sla_gpt.SlaGPTConfig",
        "AutoModel": f"{module}.SlaGPTModel",
        "AutoModelForCausalLM": f"{module}.SlaGPTForCausalLM",
        "AutoModelForSequenceClassification": f"{module}.SlaGPTForSequenceClassification",
        "AutoModelForTokenClassification": f"{module}.SlaGPTForTokenClassification",
        "AutoModelForQuestionAnswering": f"{module}.SlaGPTForQuestionAnswering",
    }
    name = str(dtype).removeprefix("torch.")
    return {"architectures": ["SlaGPTForCausalLM"], "auto_map": auto_map, "dtype": name}


def write_model_files(folder: Path, config: Mapping[str, Any], dtype: torch.dtype, special: Mapping[str, Any]) -> None:
    """``config.json``, ``generation_config.json`` and the model's code.  ``special``: token ids."""
    write_json(folder / "config.json", model_kind(dtype) | written(config) | rope_parameters(config) | dict(special))
    write_json(folder / "generation_config.json", {"do_sample": False} | dict(special))
    write_code(folder)


def write_code(folder: Path) -> None:
    """The model's code."""
    for file in CODE_FILES:
        shutil.copyfile(_HF_CODE / file, folder / file)
