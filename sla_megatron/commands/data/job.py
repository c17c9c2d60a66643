"""What is to be made of which text, and what the result depends on."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.tokenizers import TOKENIZER_PATHS
from .inputs import Inputs
from .manifests import SPLITS
from .workdir import Workdir

#: Libraries whose versions the ids depend on.
_LIBRARIES = ("megatron-core", "sentencepiece", "tokenizers", "transformers", "tiktoken")


@dataclass(frozen=True)
class Job:
    """What is to be made.

    Attributes:
        inputs: where text is.
        prefix: of the output: ``prefix.bin``, or ``prefix_train.bin`` and so on with a split.
        tokenizer: settings, as :func:`sla_megatron.common.tokenizers.tokenizer_settings` gives them.
        append_eod: whether documents end with the end-of-document token.
        split: weights of train, valid and test, or None for one data set.
        deduplicate: whether of equal texts only the first is kept.
        fatal: whether the first fault ends the job.
    """

    inputs: Inputs
    prefix: Path
    tokenizer: dict[str, Any]
    append_eod: bool = True
    split: tuple[float, ...] | None = None
    deduplicate: bool = False
    fatal: bool = True

    def outputs(self) -> dict[str, Path]:
        """Prefixes of the files by split; a single data set is ``all``."""
        if self.split is None:
            return {"all": self.prefix}
        named = zip(SPLITS, self.split, strict=False)
        return {name: self.prefix.with_name(f"{self.prefix.name}_{name}") for name, weight in named if weight}

    @property
    def workdir(self) -> Workdir:
        """Where its work is kept, and its results go."""
        return Workdir(self.prefix, tuple(self.outputs().values()))

    def settings(self) -> dict[str, Any]:
        """What the output depends on: with the same, work goes on; JSON can hold it."""
        versions = {name: importlib.metadata.version(name) for name in _LIBRARIES if _installed(name)}
        return {
            "inputs": self.inputs.identity(),
            "tokenizer": self.tokenizer,
            "tokenizer_files": _files_of(self.tokenizer),
            "append_eod": self.append_eod,
            "split": self.split,
            "deduplicate": self.deduplicate,
            "versions": versions,
        }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _files_of(tokenizer: dict[str, Any]) -> dict[str, str]:
    """Hashes of the tokenizer's files by name, where they are on this machine."""
    named = [tokenizer.get(key) for key in TOKENIZER_PATHS]
    paths = [Path(name) for name in named if name]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*")))]
    hashes = {}
    for file in files:
        # A Hugging Face folder may hold weights too.
        if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt", ".gguf", ".h5"):
            with file.open("rb") as opened:
                hashes[str(file)] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes
