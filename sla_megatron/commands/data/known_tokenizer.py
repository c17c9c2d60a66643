"""Which tokenizer made a data set: by the flags, or by the manifest that ``sla-data`` wrote beside it."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.silence import without_announcements
from ...common.tokenizers import (
    DEFAULTS,
    TOKENIZER_PATHS,
    TokenizerError,
    decode,
    tokenizer_name,
    tokenizer_settings,
)
from .contents import Documents
from .errors import DataError
from .inspection import Index
from .plain_tokenizers import build_for_data
from .progress import waiting_for

_SPLITS = ("_train", "_valid", "_test")
#: Beyond this a JSON file is a corpus.
_MANIFEST_BYTES = 1 << 24


@dataclass(frozen=True)
class Manifest:
    """What ``sla-data`` wrote about its output.

    Attributes:
        path: of the JSON file.
        tokenizer: its settings; none if the file has none.
        append_eod: whether all documents were given the end-of-document token.
        counts: of this data set, ``documents`` and ``tokens``.
        files: hashes of the tokenizer's files, by name.
    """

    path: Path
    tokenizer: dict[str, Any] | None
    append_eod: bool
    counts: dict[str, Any]
    files: dict[str, str]

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """Equal for the same tokenizer, wherever its files are; None where it is not known."""
        if not self.tokenizer:
            return None
        paths = TOKENIZER_PATHS if self.files else ()
        rest = {name: value for name, value in self.tokenizer.items() if name not in paths and value}
        return sorted(self.files.values()), sorted((name, str(value)) for name, value in rest.items())

    def faults(self, index: Index, documents: Documents) -> list[str]:
        """How the data are not what the manifest says: a line for each."""
        found = {"documents": index.documents, "tokens": index.tokens}
        faults = [
            f"{self.path}: {self.counts[name]} {name}, the data have {count}"
            for name, count in found.items()
            if name in self.counts and self.counts[name] != count
        ]
        if self.append_eod and documents.not_ended is not None:
            faults.append(
                f"{self.path}: every document ends with the end-of-document token, document {documents.not_ended} "
                "does not"
            )
        return faults


def find_manifest(prefix: str) -> Manifest | None:
    """The manifest beside ``prefix``; None if there is none."""
    for suffix in ("", *_SPLITS):
        path = Path(f"{prefix.removesuffix(suffix)}.json")
        content = _content(path) if prefix.endswith(suffix) else None
        if content is None:
            continue
        outputs = content["outputs"].values()
        counts = next(
            (one for one in outputs if isinstance(one, dict) and one.get("prefix") == Path(prefix).name), None
        )
        # A file of the very name belongs to the data even after both were renamed.
        if counts is not None or not suffix:
            tokenizer, made_with = content.get("tokenizer"), content.get("settings")
            files = made_with.get("tokenizer_files") if isinstance(made_with, dict) else None
            return Manifest(
                path,
                tokenizer if isinstance(tokenizer, dict) else None,
                bool(content.get("append_eod")),
                counts or {},
                files if isinstance(files, dict) else {},
            )
    return None


def _content(path: Path) -> dict[str, Any] | None:
    try:
        if not path.is_file() or path.stat().st_size > _MANIFEST_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # Anything may be called like this, a corpus too.
    return content if isinstance(content, dict) and isinstance(content.get("outputs"), dict) else None


class Known:
    """A tokenizer: what messages call it, and what checks and texts need of it.

    Attributes:
        origin: ``" (from FILE)"``, or nothing if flags named it.
        vocabulary: how many tokens it has.
        eod: the end-of-document token, if it has one.
    """

    def __init__(self, settings: dict[str, Any], origin: str = "") -> None:
        namespace = Namespace(**{**DEFAULTS, **settings})
        self.name = tokenizer_name(namespace)
        self.origin = origin
        with without_announcements(), waiting_for("loading the tokenizer"):
            self._tokenizer = build_for_data(namespace)
        self.vocabulary: int = self._tokenizer.vocab_size
        eod = getattr(self._tokenizer, "eod", None)
        # A token that there is not has the id -1 in some of Megatron's tokenizers.
        self.eod: int | None = None if eod == -1 else eod

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, which are below ``vocabulary``."""
        return decode(self._tokenizer, ids)


class Tokenizers:
    """The tokenizers of one command, each built once.

    Attributes:
        why_none: why :meth:`of` gave none the last time, if there should have been one.

    Raises:
        DataError: if flags describe a tokenizer, but not its type.
        TokenizerError: if the tokenizer that flags describe cannot be built.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        settings = tokenizer_settings(args)
        self.why_none: str | None = None
        self._by_flags = None
        self._built: dict[str, Known] = {}
        if settings["tokenizer_type"] is not None:
            self._by_flags = Known(settings)
        elif any(settings[name] != default for name, default in DEFAULTS.items()):
            raise DataError("flags of a tokenizer: expected --tokenizer-type beside them")

    def of(self, manifest: Manifest | None) -> Known | None:
        """What the flags name, else what ``manifest`` does; None if neither does or the latter cannot be read."""
        self.why_none = None
        if self._by_flags is not None or manifest is None or not manifest.tokenizer:
            return self._by_flags
        key = json.dumps(manifest.tokenizer, sort_keys=True)
        try:
            if key not in self._built:
                self._built[key] = Known(manifest.tokenizer, f" (from {manifest.path})")
        except (TokenizerError, AttributeError) as error:
            # It may have moved since; the data can be checked without it.
            self.why_none = f"not known: {manifest.path}: {error}"
            return None
        return self._built[key]
