"""Megatron's tokenizer object from Megatron's tokenizer flags, outside of its trainer.

What counts is the object that Megatron itself builds: it says how a text is encoded and which token ends a document.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import StartError, first_line
from .replacing import unused_name
from .silence import without_announcements

SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TEXT = (*SENTENCEPIECE, "GPT2BPETokenizer", "HuggingFaceTokenizer", "TikTokenizer")

#: What ``build_tokenizer`` reads, with Megatron's defaults.
DEFAULTS: dict[str, Any] = {
    "tokenizer_model": None,
    "vocab_file": None,
    "merge_file": None,
    "vocab_size": None,
    "metadata_path": None,
    "special_tokens": None,
    "chat_template": None,
    "tiktoken_pattern": None,
    "tiktoken_num_special_tokens": 1000,
    "tokenizer_sentencepiece_legacy": False,
    "tokenizer_sentencepiece_ignore_extra_whitespaces": True,
    "tokenizer_hf_no_use_fast": False,
    "tokenizer_hf_no_include_special_tokens": False,
    "trust_remote_code": False,
}
#: Those that say where a tokenizer is, and all that name files.
MODEL_PATHS = ("tokenizer_model", "vocab_file", "merge_file")
TOKENIZER_PATHS = (*MODEL_PATHS, "metadata_path")
_HUB_TIMEOUT = 3.0

#: Any of these makes a folder one with a Hugging Face tokenizer.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)

#: Within a checkpoint of one iteration, the folder of its tokenizer: as the main branch of Megatron writes it.
CARRIED = "tokenizer"
#: Type -> flag, by its attribute, and the name of its file there.  A Hugging Face tokenizer is saved as a folder.
CARRIED_FILES: dict[str, dict[str, str]] = {
    **{kind: {"tokenizer_model": "tokenizer.model"} for kind in SENTENCEPIECE},
    "TikTokenizer": {"tokenizer_model": "tokenizer.json"},
    "GPT2BPETokenizer": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
}


class TokenizerError(StartError):
    """Why a tokenizer cannot be read or carried along, as one line."""


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Megatron's flags for text tokenizers, by Megatron's names: what encodes a corpus here, pretraining then takes."""
    group = parser.add_argument_group("tokenizer", "the same flags as in pretraining")
    group.add_argument("--tokenizer-type", choices=TEXT)
    group.add_argument("--tokenizer-model", metavar="PATH", help="a model file, or a Hugging Face folder or name")
    group.add_argument("--vocab-file", metavar="PATH")
    group.add_argument("--merge-file", metavar="PATH")
    group.add_argument("--vocab-size", type=int, help="of a tiktoken model: its first so many tokens")
    group.add_argument("--tokenizer-metadata", dest="metadata_path", metavar="PATH")
    group.add_argument("--tokenizer-special-tokens", dest="special_tokens", nargs="+", metavar="TOKEN")
    group.add_argument("--tiktoken-pattern", choices=("v1", "v2"))
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=DEFAULTS["tiktoken_num_special_tokens"])
    group.add_argument("--tokenizer-sentencepiece-legacy", action="store_true")
    group.add_argument(
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces",
        dest="tokenizer_sentencepiece_ignore_extra_whitespaces",
        action="store_false",
    )
    group.add_argument("--tokenizer-hf-no-use-fast", action="store_true")
    group.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true")
    group.add_argument("--trust-remote-code", action="store_true")


def tokenizer_settings(args: Namespace) -> dict[str, Any]:
    """The tokenizer's part of ``args``, complete, as :func:`build` takes it; JSON can hold it."""
    given = vars(args)
    names = ("tokenizer_type", *DEFAULTS)
    return {name: given.get(name, DEFAULTS.get(name)) for name in names}


def build(settings: Namespace) -> Any:
    """The object that Megatron trains with.

    Upstream: ``megatron.core.tokenizers.utils.build_tokenizer.build_tokenizer``. The Hub is asked only for what is not
    on this machine.

    Args:
        settings: ``tokenizer_type`` and every name in :data:`DEFAULTS`.

    Raises:
        TokenizerError: with one line, if Megatron cannot build it.
    """
    with without_announcements():
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    try:
        # Without a process group Megatron wonders about its rank.
        with warnings.catch_warnings(action="ignore"), hub_asked_for(settings):
            return build_tokenizer(Namespace(**{**vars(settings), "pad_vocab_size": False}))
    except Exception as error:
        raise TokenizerError(f"{tokenizer_name(settings)} cannot be read: {first_line(error)}") from error


def tokenizer_name(settings: Namespace) -> str:
    """Type and file, as a message shows them."""
    source = settings.vocab_file if settings.tokenizer_type == "GPT2BPETokenizer" else settings.tokenizer_model
    return f"{settings.tokenizer_type} {source}" if source else settings.tokenizer_type


def carry_files(settings: Namespace, tokenizer: Any, checkpoint: Path) -> bool:
    """Put the tokenizer into a checkpoint, whole or not at all; returns whether there is anything to put there.

    Args:
        settings: as of :func:`build`, with paths that are there.
        tokenizer: what :func:`build` made of them; only a Hugging Face tokenizer is asked for it.
        checkpoint: the folder of one iteration.

    Raises:
        OSError: for what cannot be read or written.
    """
    files = {
        name: getattr(settings, flag, None) for flag, name in CARRIED_FILES.get(settings.tokenizer_type, {}).items()
    }
    is_folder = settings.tokenizer_type == "HuggingFaceTokenizer"
    if not any(files.values()) and not (is_folder and tokenizer is not None):
        return False
    folder = checkpoint / CARRIED
    unfinished, replaced = (unused_name(folder, what) for what in ("unfinished", "replaced"))
    try:
        unfinished.mkdir()
        if is_folder:
            tokenizer._tokenizer.tokenizer.save_pretrained(unfinished)
        for name, path in files.items():
            if path:
                shutil.copyfile(path, unfinished / name)
        if folder.exists():
            # Of a save of this iteration that was broken off.
            folder.rename(replaced)
        unfinished.rename(folder)
    finally:
        for left in (unfinished, replaced):
            shutil.rmtree(left, ignore_errors=True)
    return True


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of ``ids``, which are below ``tokenizer.vocab_size``; ``tokenizer`` is one that :func:`build` gave."""
    if tokenizer.library in ("huggingface", "megatron"):
        # Megatron's own decoding joins the tokens without what the Hugging Face tokenizer does to them.
        return tokenizer._tokenizer.tokenizer.decode(ids)
    return tokenizer.detokenize(ids)


def token_count(tokenizer: Any) -> int:
    """One more than the highest id; ``tokenizer`` is one that :func:`build` gave.

    A Hugging Face tokenizer whose ids have holes counts less than that, and so does Megatron.
    """
    if tokenizer.library not in ("huggingface", "megatron"):
        return tokenizer.vocab_size
    return max(tokenizer.vocab_size, 1 + max(tokenizer._tokenizer.tokenizer.get_vocab().values(), default=-1))


def is_path(model: str) -> bool:
    """Whether a name cannot be one of the Hub's, which are ``model`` or ``owner/model``."""
    return model.startswith(("/", ".", "~")) or model.endswith("/") or model.count("/") > 1


@contextmanager
def hub_asked_for(settings: Namespace) -> Iterator[None]:
    """Within the block the Hub is asked only if the tokenizer is not on this machine, and the Hub is there.

    Retries would take a minute for each file.
    """
    name = {"GPT2BPETokenizer": "gpt2", "HuggingFaceTokenizer": settings.tokenizer_model}.get(settings.tokenizer_type)
    if name is None:
        yield
        return
    from huggingface_hub import constants

    needed = bool(name) and not os.path.exists(name)
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not (needed and _answers(constants.ENDPOINT))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _answers(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urlsplit(endpoint)
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=_HUB_TIMEOUT).close()
    except OSError:
        return False
    return True
