"""The tokenizer of a checkpoint as lm-eval wants it: transformers', with Megatron's ids."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...common.errors import first_line
from ...common.tokenizers import TokenizerError
from ..convert.tokenizer import carry_tokenizer, vocabulary_size, with_model
from ..convert.tokenizer_place import placed
from .arguments import EvaluationError


def tokenizer_of(
    stored: Namespace,
    folder: Path,
    tokenizer: str | None = None,
    tokenizer_model: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, int]:
    """The tokenizer of transformers for texts, and how many rows of the vocabulary are not padding.

    The checkpoint's own is made one of transformers as an export's is, which compares what both make of texts.

    Args:
        stored: the checkpoint's arguments.
        folder: of one iteration.
        tokenizer: a folder, or a name of the Hub, in its place.
        tokenizer_model: where the checkpoint's own tokenizer is now, if it has moved: a file or a folder.
        trust_remote_code: whether code in ``tokenizer`` may run.

    Raises:
        EvaluationError: for what cannot be read, or has more tokens than the model.
    """
    given = None if tokenizer is None else _loaded(tokenizer, trust_remote_code)
    args, tried = (stored, []) if tokenizer_model is not None else placed(stored, folder)
    try:
        args = with_model(args, tokenizer_model)
        size = vocabulary_size(args)
    except TokenizerError as error:
        if given is None:
            raise EvaluationError(f"{error.reason}{'; tried ' if tried else ''}{', '.join(tried)}") from error
        size = 1 + max(given.get_vocab().values())
    if given is None:
        if args.tokenizer_type == "NullTokenizer":
            raise EvaluationError(f"{folder}: its NullTokenizer has no texts: expected tokenizer=PATH")
        with TemporaryDirectory() as carried:
            try:
                carry_tokenizer(args, Path(carried))
            except TokenizerError as error:
                raise EvaluationError(error.reason) from error
            given = _loaded(carried, trust_remote_code)
            given.name_or_path = str(folder)
    highest = max(given.get_vocab().values())
    if highest >= size:
        raise EvaluationError(f"tokenizer={tokenizer}: it has a token {highest}, the model's are below {size}")
    return given, size


def _loaded(tokenizer: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if tokenizer.startswith(("/", ".", "~")) and not os.path.isdir(tokenizer):
        raise EvaluationError(f"tokenizer={tokenizer}: no such folder")
    try:
        return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    # Broken files and tokenizers of other kinds: many kinds of errors, of several libraries.
    except Exception as error:
        raise EvaluationError(f"tokenizer={tokenizer}: it does not load: {first_line(error)}") from error
