"""Megatron's tensors from those of the Hugging Face format: the mapping, the other way round."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict

import torch
from torch import Tensor

from .errors import ConvertError
from .mapping import KEY, QUERY, VALUE, VOCABULARY, Entry, entries, qkv_rows
from .source import Source
from .stored_keys import StoredKeys


class Assembler:
    """Builds one Megatron tensor at a time.

    Args:
        source: what has the parts.
        vocabulary_rows: rows of a vocabulary tensor, padding included.
        args: of the Megatron model.
    """

    def __init__(self, source: Source, vocabulary_rows: int, args: Namespace) -> None:
        self.source, self.vocabulary_rows, self._keys = source, vocabulary_rows, StoredKeys(args)
        self._parts: dict[tuple[str, int | None], list[Entry]] = defaultdict(list)
        for entry in entries(source.config):
            self._parts[entry.megatron, entry.layer].append(entry)
        self._unused = set(self._parts)

    def tensor(self, key: str, layer: int | None, start: int, length: int) -> Tensor:
        """Rows of the tensor that Megatron stores under ``key``, of ``layer`` where it stores the layers as one.

        Not copied where the source has them in one piece; it is not to be written to.

        Raises:
            ConvertError: if it is not part of the architecture.
        """
        name, layer = self._keys.name(key, layer)
        parts = self._parts.get((name, layer))
        if parts is None:
            raise ConvertError(f"{self.source.path}: Megatron's tensor {key} has nothing to be made of")
        self._unused.discard((name, layer))
        if parts[0].part == VOCABULARY:
            return self._vocabulary(parts[0])[start : start + length]
        if QUERY in (part.part for part in parts):
            return self._mixed(layer, {part.part: self._whole(part.hf) for part in parts})[start : start + length]
        found, at = [], 0
        for part in parts:
            begin, end = max(start - at, 0), min(start + length - at, part.shape[0])
            found += [self._whole(part.hf)[begin:end]] if begin < end else []
            at += part.shape[0]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _whole(self, name: str) -> Tensor:
        parts = self.source.parts(name)
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def require_all_used(self) -> None:
        """Raise ``ConvertError`` if a tensor of the source went nowhere."""
        if self._unused:
            raise ConvertError(f"{self.source.path}: {min(map(str, self._unused))} is no tensor of Megatron's model")

    def _mixed(self, layer: int, tensors: dict[str, Tensor]) -> Tensor:
        """The rows of queries, keys and values, group by group."""
        rows = qkv_rows(self.source.config, layer)
        pieces: list[tuple[int, Tensor]] = []
        for part in (QUERY, KEY, VALUE):
            taken = 0
            for start, length in rows[part]:
                pieces.append((start, tensors[part][taken : taken + length]))
                taken += length
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda placed: placed[0])])

    def _vocabulary(self, entry: Entry) -> Tensor:
        """With the rows that were cut, where they are known, or rows of zeros."""
        tensor = self._whole(entry.hf)
        missing = self.vocabulary_rows - len(tensor)
        if missing == 0:
            return tensor
        padding = self.source.padding(entry.hf)
        if padding is None or len(padding) != missing:
            padding = tensor.new_zeros(missing, tensor.shape[1])
        return torch.cat([tensor, padding.to(tensor.dtype)])
