"""Tokenizers as their own libraries build them, where that is all that Megatron's object does.

Importing Megatron takes six seconds of a processor, longer than encoding the first megabytes.  Of the two common kinds
its object adds nothing to the ids: it calls ``SentencePieceProcessor.encode_as_ids``, or a tokenizer of transformers,
and ends documents with their end-of-sentence token.  Other kinds, and other flags than the model's, are Megatron's.
Upstream: ``megatron/core/tokenizers/text/libraries``, ``sentencepiece_tokenizer.py`` and ``huggingface_tokenizer.py``.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ...common.errors import first_line
from ...common.tokenizers import DEFAULTS, TokenizerError, build, hub_asked_for, tokenizer_name


def build_for_data(settings: Namespace) -> Any:
    """What has the ids of Megatron's tokenizer: ``tokenize``, ``detokenize``, ``vocab_size``, ``eod`` and ``library``.

    Args:
        settings: as of :func:`sla_megatron.common.tokenizers.build`.

    Raises:
        TokenizerError: with one line, if it cannot be built.
    """
    if not _is_plain(settings):
        return build(settings)
    try:
        with hub_asked_for(settings):
            plain = _PLAIN[settings.tokenizer_type](settings.tokenizer_model)
    except Exception as error:  # The libraries', of many types.
        raise TokenizerError(f"{tokenizer_name(settings)} cannot be read: {first_line(error)}") from error
    # Without one, Megatron gives the separator that role.
    return build(settings) if plain.eod is None else plain


def imported_for(settings: dict[str, Any]) -> str:
    """The module, with all that it imports, that :func:`build_for_data` needs for these settings."""
    plain = _is_plain(Namespace(**settings))
    return _PLAIN[settings["tokenizer_type"]].module if plain else f"{__package__}.megatron_imports"


def _is_plain(settings: Namespace) -> bool:
    """Whether it is of the two kinds, and no flag but the model's is given."""
    others = {name: default for name, default in DEFAULTS.items() if name != "tokenizer_model"}
    return (
        settings.tokenizer_type in _PLAIN
        and bool(settings.tokenizer_model)
        and all(getattr(settings, name) == default for name, default in others.items())
    )


class _SentencePiece:
    library = module = "sentencepiece"

    def __init__(self, model: str) -> None:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=model)
        self.tokenize, self.detokenize = processor.encode_as_ids, processor.decode_ids
        self.vocab_size: int = processor.get_piece_size()
        self.eod: int = processor.eos_id()


class _HuggingFace:
    library, module = "transformers", "transformers.models.auto.tokenization_auto"

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model, use_fast=True, trust_remote_code=False)
        # The first call takes off the padding and truncation that its file may ask for.
        self._tokenizer("")
        self._backend = self._tokenizer.backend_tokenizer if _adds_nothing(self._tokenizer) else None
        self.detokenize = self._tokenizer.decode
        self.vocab_size = len(self._tokenizer)
        self.eod: int | None = self._tokenizer.eos_token_id

    def tokenize(self, text: str) -> list[int]:
        if self._backend is None:
            return self._tokenizer(text).input_ids
        # Neither masks nor where in the text tokens are, which take a fifth of the time.
        return self._backend.encode_batch_fast([text])[0].ids


def _adds_nothing(tokenizer: Any) -> bool:
    """Whether a call of it, as far as ids go, is one of its library's object; some models' own classes do more."""
    from transformers import PreTrainedTokenizerFast

    plain = isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), name) is getattr(PreTrainedTokenizerFast, name)
        for name in ("__call__", "_encode_plus")
    )
    return plain and hasattr(tokenizer.backend_tokenizer, "encode_batch_fast")


_PLAIN = {"SentencePieceTokenizer": _SentencePiece, "HuggingFaceTokenizer": _HuggingFace}
