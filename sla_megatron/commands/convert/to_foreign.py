"""A dense model leaves as what it is: a folder of Llama's, Mistral's, Qwen2's, Qwen3's or GPT-2's class."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.tokenizers import TokenizerError
from .architecture import MODEL_TYPE
from .errors import ConvertError
from .foreign import FOREIGN
from .hf_folder import TensorInfo, write_json
from .mapping import Entry, entries, sla_of
from .source import Source
from .tokenizer import carry_tokenizer


def fitting(config: Mapping[str, Any]) -> list[str]:
    """Each ``model_type`` that a model of ``config`` can be exported as: of other architectures, then our own."""
    is_dense = sla_of(config).is_dense
    return [*(kind for kind, each in FOREIGN.items() if is_dense and each.misfit(config) is None), MODEL_TYPE]


def chosen(source: Source, asked: str | None = None) -> str:
    """The ``model_type`` that ``source`` is exported as.

    Unless ``asked``, it is the other architecture that the model is; of Llama and Mistral, which are one function
    without a window, Llama.  It is ours for skip-layer attention, for what no other architecture has, and where engines
    with that architecture are known to pass over something that the model has (``Foreign.usual``).

    Raises:
        ConvertError: if it was ``asked`` for one that the model is not.
    """
    fit = fitting(source.config)
    if asked is None:
        return next((kind for kind in fit if kind == MODEL_TYPE or FOREIGN[kind].is_usual(source.config)), MODEL_TYPE)
    if asked in fit:
        return asked
    if asked not in FOREIGN:
        why = "no such architecture"
    elif sla_of(source.config).is_dense:
        why = f"{source.path} has {FOREIGN[asked].misfit(source.config)}"
    else:
        why = f"{source.path} has skip-layer attention"
    raise ConvertError(f"--as {asked}: {why}: expected {' or '.join(fit)}")


def exported_as(source: Source, kind: str) -> str:
    """``kind``, and which others ``--as`` takes."""
    others = [other for other in fitting(source.config) if other != kind]
    return f"{kind} (or --as {', '.join(others)})" if others else kind


def carry(source: Source, folder: Path, kind: str, asked: bool, special_as_text: bool) -> tuple[str, str]:
    """Write the tokenizer of ``source`` into ``folder``; returns what the model can leave as with it, and what it is.

    transformers reads some architectures' folders with a tokenizer of its own choice: Qwen2's, with Qwen2's, whatever
    the files say.  Where that is another one than the checkpoint's, the folder is of our format, unless ``asked``.

    Raises:
        ConvertError: if the tokenizer cannot be carried, or not into what was ``asked`` for.
    """
    other: TokenizerError | None = None
    if kind != MODEL_TYPE:
        write_json(folder / "config.json", {"model_type": kind})
        try:
            return kind, carry_tokenizer(source.args, folder, special_as_text=special_as_text)
        except TokenizerError as error:
            other = error
        (folder / "config.json").unlink()
    try:
        carried = carry_tokenizer(source.args, folder, special_as_text=special_as_text)
    except TokenizerError as error:
        raise ConvertError(str(error)) from error
    if other is None:
        return MODEL_TYPE, carried
    why = f"with the tokenizer that transformers finds in such a folder: {other}"
    if asked:
        raise ConvertError(f"--as {kind}: {why}: expected sla_gpt")
    print(f"sla-convert: not exported as {kind}, {why}", file=sys.stderr)
    return MODEL_TYPE, carried


class AsForeign:
    """The tensors and files of a dense ``source`` in a folder of the architecture ``kind``, one that fits it."""

    def __init__(self, source: Source, kind: str) -> None:
        self._source, self._foreign = source, FOREIGN[kind]
        # Ours that are in theirs, by its name: one, but for GPT-2's mixed projection.
        self._entries: dict[str, list[Entry]] = {}
        for entry in entries(source.config):
            self._entries.setdefault(self._foreign.names(entry.hf)[0], []).append(entry)

    def infos(self, dtype: torch.dtype | None) -> list[TensorInfo]:
        """What is going to be written, in ``dtype`` or as stored."""
        return [
            TensorInfo(name, dtype or self._source.dtype(first.hf), self._foreign.stored_shape(first.hf, first.shape))
            for name, (first, *_) in self._entries.items()
        ]

    def parts(self, name: str) -> list[Tensor]:
        """Their tensor of that name, as :meth:`Source.parts` gives ours."""
        ours = self._entries[name]
        parts = [part for entry in ours for part in self._source.parts(entry.hf)]
        return [torch.cat(parts).t()] if self._foreign.is_transposed(ours[0].hf) else parts

    def write_model_files(self, folder: Path, dtype: torch.dtype, special: Mapping[str, Any]) -> None:
        """``config.json`` and ``generation_config.json``: transformers has the code.  ``special``: token ids."""
        kind = str(dtype).removeprefix("torch.")
        # The second name is that of transformers before 4.56.
        types = {"dtype": kind, "torch_dtype": kind}
        write_json(folder / "config.json", self._foreign.theirs(self._source.config) | types | dict(special))
        write_json(folder / "generation_config.json", {"do_sample": False} | dict(special))
