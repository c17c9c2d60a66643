"""Documents to token ids, those of the tokenizer that Megatron trains with."""

from __future__ import annotations

import logging
from argparse import Namespace
from array import array
from typing import Any

import numpy

from ...common.tokenizers import TokenizerError, tokenizer_name
from .index_format import dtype_of
from .plain_tokenizers import build_for_data


class Encoder:
    """Text to the ids of one document, its end included.

    Args:
        settings: of the tokenizer, as :func:`sla_megatron.common.tokenizers.tokenizer_settings` gives them.
        append_eod: whether a document ends with the tokenizer's end-of-document token.

    Raises:
        TokenizerError: if the tokenizer cannot be built, or has no token to end documents with.
    """

    def __init__(self, settings: dict[str, Any], append_eod: bool) -> None:
        # A long document is no reason for transformers to warn: pretraining cuts it.
        logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
        self.tokenizer = build_for_data(Namespace(**settings))
        self.vocab_size: int = self.tokenizer.vocab_size
        self.dtype = dtype_of(self.vocab_size)
        self._end = self._end_of_document(Namespace(**settings)) if append_eod else []

    def _end_of_document(self, settings: Namespace) -> list[int]:
        """The token to append; none where the tokenizer ends every text with it by itself."""
        eod = self.tokenizer.eod
        if eod is None or eod < 0:
            raise TokenizerError(f"{tokenizer_name(settings)} has no end-of-document token: expected --no-append-eod")
        return [] if self.tokenizer.tokenize("a")[-1:] == [eod] else [eod]

    def __call__(self, text: str) -> numpy.ndarray:
        """Token ids ``[n]`` of ``dtype``.

        Raises whatever the tokenizer raises on a text that it cannot encode, and ``ValueError`` for an id that a model
        with this vocabulary has no embedding for.
        """
        ids = self.tokenizer.tokenize(text) + self._end
        # Of 64 bits: what does not fit the type is to be named, too.
        wide = numpy.frombuffer(array("q", ids), dtype=numpy.int64)
        # Without a sign, what is below 0 is beyond any vocabulary.
        if len(wide) and wide.view(numpy.uint64).max() >= self.vocab_size:
            wrong = wide.max() if wide.max() >= self.vocab_size else wide.min()
            raise ValueError(f"id {wrong} is beyond the vocabulary of {self.vocab_size:,} tokens")
        return wide.astype(self.dtype)
