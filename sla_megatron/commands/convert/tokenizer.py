"""The tokenizer of a Megatron checkpoint as files that ``AutoTokenizer`` loads, with the same ids.

What counts is the tokenizer object that Megatron itself builds from the checkpoint's arguments: it says how many tokens
there are and how a text is encoded, and what is written is compared with it before anyone uses it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...common.tokenizers import (
    DEFAULTS,
    MODEL_PATHS,
    SENTENCEPIECE,
    TokenizerError,
    build,
    decode,
    is_path,
    token_count,
    tokenizer_name,
)
from .tokenizer_formats import UnsupportedModel, controls_of, has_ties, save_tokenizer, symbols_of

SUPPORTED = (*SENTENCEPIECE, "GPT2BPETokenizer", "HuggingFaceTokenizer", "TikTokenizer", "NullTokenizer")

# The size of the vocabulary that GPT2BPETokenizer gets from the Hub.
_GPT2_TOKENS = 50257

_SAMPLES = (
    "",
    " ",
    "   ",
    "\n",
    "\t",
    "hello",
    "Hello, World!",
    " leading space",
    "trailing space ",
    "  two  spaces   and more    between  ",
    "line one\nline two\n\n\nline five\n",
    "windows\r\nline ends\r\n",
    "\ttab\tseparated\t\tvalues\t",
    "def f(x: int) -> str:\n    return f'{x:>8}' if x != 0 else \"\"  # comment\n",
    'for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; }\n\t// {"key": [1, 2.5e-3, null]}',
    "0 1 23 456 7890 3.14159 1,000,000 0x1F 1e-5 2024-01-31",
    "don't we'll they've I'm it's DON'T",
    "naïve café Ünïcödé ÀÉÎÕÜ ñ ç ß ø å œ Straße",
    "cafe\u0301 a decomposed accent",
    "中文字符测试。 日本語のテキスト、カタカナ。 한국어 문장",
    "Привет, мир! Ελληνικά שלום عربى हिन्दी ไทย",
    "emoji 😀🎉👍🏽 👩‍👩‍👧 flags 🇩🇪",
    "no\u00a0break\u3000wide \u2028 separator \u200b zero",
    "ﬁ ① ½ Ａｂｃ ™ … “quotes” – dash —",
    "http://example.org/path?query=1&other=%20#part user@example.org",
    "<s> </s> <unk> <pad> <mask> <|endoftext|> <0x41> [INST] a<b>c</b>",
    "word" * 40,
    "\x00\x01\x7f",
)
# Of the special tokens' names, and the user's symbols: with thousands of them, some are enough.
_NAMES = 64
_RANDOM_TEXTS = 200
_RANDOM_LENGTH = 12


def carry_tokenizer(args: Namespace, folder: Path, model: str | None = None, special_as_text: bool = False) -> str:
    """Write the tokenizer that ``args`` name into ``folder``, such that ``AutoTokenizer`` loads it.

    Args:
        args: the arguments that Megatron stored with the checkpoint.
        folder: where the files go; it need not exist.
        model: where the tokenizer's model is now, if it has moved: a file, or a folder for Hugging Face tokenizers.
        special_as_text: of a sentencepiece model: the names of special tokens in a text stay text, as in Megatron.

    Returns:
        One line that says what was carried, or that there is nothing to carry.

    Raises:
        TokenizerError: if the tokenizer cannot be read, or what was written gives other ids; nothing is left then.
    """
    settings = _settings(args, model)
    if settings.tokenizer_type == "NullTokenizer":
        return "none (NullTokenizer: texts are written as ids)"
    tokenizer = _megatron_tokenizer(settings)
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    try:
        problem = _write(tokenizer, folder, settings, special_as_text)
        if problem is not None:
            raise TokenizerError(f"{tokenizer_name(settings)} cannot be carried along: {problem}")
    except BaseException:
        for path in set(folder.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    ties = "; of two encodings of a text that score the same it may take the other" if has_ties(tokenizer) else ""
    return f"{tokenizer_name(settings)}, {tokenizer.vocab_size} tokens{ties}"


def _write(tokenizer: Any, folder: Path, settings: Namespace, special_as_text: bool) -> str | None:
    """Why what is now in ``folder`` is not ``tokenizer``; None if it is."""
    try:
        save_tokenizer(tokenizer, folder, getattr(settings, "max_position_embeddings", None), special_as_text)
    except UnsupportedModel as error:
        return f"it {error}"
    return _first_difference(tokenizer, folder, settings.trust_remote_code)


def vocabulary_size(args: Namespace, model: str | None = None) -> int:
    """How many tokens the model of ``args`` has, without the rows that Megatron pads its embeddings by.

    As many as its tokenizer; a checkpoint made of a model with more, as many published ones have, says how many.

    Raises:
        TokenizerError: if the tokenizer cannot be read.
    """
    settings = _settings(args, model)
    if settings.tokenizer_type == "NullTokenizer" and settings.vocab_size:
        # As Megatron's, which is that number; importing it takes more time than a small export.
        return _fitting(settings, int(settings.vocab_size))
    tokens = token_count(_megatron_tokenizer(settings))
    named = getattr(args, "vocab_size", None) or 0
    if args.tokenizer_type == "HuggingFaceTokenizer" and named <= (getattr(args, "padded_vocab_size", None) or 0):
        return max(tokens, named)
    return tokens


def with_model(args: Namespace, model: str | None) -> Namespace:
    """``args`` with the files of ``model``, where it is given.  Raises ``TokenizerError`` where there are none."""
    if model is None:
        return args
    settings = _settings(args, model)
    return Namespace(**vars(args) | {name: getattr(settings, name) for name in MODEL_PATHS})


def _settings(args: Namespace, model: str | None) -> Namespace:
    """The arguments that Megatron's ``build_tokenizer`` reads, complete, with ``model`` in its place."""
    settings = Namespace(**{**DEFAULTS, **vars(args), "pad_vocab_size": False})
    kind = getattr(args, "tokenizer_type", None)
    if kind is None:
        raise TokenizerError("the checkpoint names no tokenizer (--tokenizer-type)")
    if kind not in SUPPORTED:
        raise TokenizerError(
            f"--tokenizer-type {kind} has no Hugging Face form: expected one of {', '.join(SUPPORTED)}"
        )
    if kind in SENTENCEPIECE and settings.tokenizer_sentencepiece_legacy:
        raise TokenizerError("--tokenizer-sentencepiece-legacy has no Hugging Face form")
    if settings.metadata_path and not Path(settings.metadata_path).is_file():
        # It says no more than --tokenizer-type does, but for a chat template.
        settings.metadata_path = None
    if kind == "GPT2BPETokenizer":
        _place_gpt2_files(settings, model)
    elif kind != "NullTokenizer":
        settings.tokenizer_model = model or settings.tokenizer_model
        if not settings.tokenizer_model:
            raise TokenizerError(f"the checkpoint's {kind} has no model: --tokenizer-model PATH")
        if not os.path.exists(settings.tokenizer_model) and (
            kind != "HuggingFaceTokenizer" or is_path(settings.tokenizer_model)
        ):
            raise TokenizerError(_gone("tokenizer model", settings.tokenizer_model))
    return settings


def _place_gpt2_files(settings: Namespace, model: str | None) -> None:
    if model is None:
        return
    path = Path(model)
    if not path.exists():
        raise TokenizerError(_gone("vocabulary", model))
    folder = path if path.is_dir() else path.parent
    vocabularies = [settings.vocab_file, "vocab.json", "gpt2-vocab.json"] if path.is_dir() else [model]
    settings.vocab_file = _first_of(folder, vocabularies)
    settings.merge_file = _first_of(folder, [settings.merge_file, "merges.txt", "gpt2-merges.txt"])
    if settings.vocab_file is None or settings.merge_file is None:
        raise TokenizerError(f"--tokenizer-model {model}: expected vocab.json, and merges.txt next to it")


def _first_of(folder: Path, names: list[str | None]) -> str | None:
    found = (folder / Path(name).name for name in names if name)
    return next((str(path) for path in found if path.is_file()), None)


def _gone(what: str, path: str) -> str:
    return f"{what} {path} of the checkpoint is not there: --tokenizer-model PATH"


def _megatron_tokenizer(settings: Namespace) -> Any:
    """The object that Megatron trains with."""
    gpt2 = settings.tokenizer_type == "GPT2BPETokenizer"
    tokenizer = _megatron_gpt2(settings) if gpt2 else build(settings)
    _fitting(settings, token_count(tokenizer))
    return tokenizer


def _fitting(settings: Namespace, tokens: int) -> int:
    """``tokens``, where the checkpoint's vocabulary has a row for each."""
    rows = getattr(settings, "padded_vocab_size", None)
    if rows is not None and tokens > rows:
        raise TokenizerError(
            f"{tokenizer_name(settings)} has {tokens} tokens, the checkpoint's vocabulary {rows}: "
            "it is not the tokenizer of this checkpoint: --tokenizer-model PATH"
        )
    return tokens


def _megatron_gpt2(settings: Namespace) -> Any:
    """Megatron's own object where its ``gpt2`` is at hand, else the same one from the checkpoint's two files.

    Megatron loads the Hub's ``gpt2`` and hands it the files; transformers ignores those where a ``tokenizer.json``
    comes with it, as it does on the Hub.
    """
    with suppress(TokenizerError):
        return build(settings)
    for path in (settings.vocab_file, settings.merge_file):
        if not path or not Path(path).is_file():
            raise TokenizerError(_gone("vocabulary", path or "(--vocab-file, --merge-file)"))
    with TemporaryDirectory() as folder:
        shutil.copy(settings.vocab_file, Path(folder, "vocab.json"))
        shutil.copy(settings.merge_file, Path(folder, "merges.txt"))
        Path(folder, "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        from_files = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": folder}
        tokenizer = build(Namespace(**{**vars(settings), **from_files, "metadata_path": None}))
    if tokenizer.vocab_size < _GPT2_TOKENS <= (getattr(settings, "padded_vocab_size", None) or 0):
        raise TokenizerError(
            f"{tokenizer_name(settings)} has {tokenizer.vocab_size} tokens, the checkpoint those of the Hub's gpt2, "
            "which Megatron takes in place of the file: put it into the Hugging Face cache"
        )
    return tokenizer


def _first_difference(tokenizer: Any, folder: Path, trust_remote_code: bool) -> str | None:
    """Where the tokenizer saved in ``folder`` and Megatron's ``tokenizer`` differ first; None if they agree."""
    from transformers import AutoTokenizer

    try:
        saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=bool(trust_remote_code))
    except Exception as error:
        return f"AutoTokenizer cannot load it: {next(iter(str(error).splitlines()), type(error).__name__)}"
    if len(saved) > tokenizer.vocab_size:
        return f"it would have {len(saved)} tokens, Megatron's has {tokenizer.vocab_size}"
    return _special_difference(tokenizer, saved) or _text_difference(tokenizer, saved)


def _special_difference(tokenizer: Any, saved: Any) -> str | None:
    for name, wanted in {"eod": "eos", "bos": "bos", "pad": "pad", "unk": "unk"}.items():
        expected, given = getattr(tokenizer, name), getattr(saved, f"{wanted}_token_id")
        # A token that there is not has the id -1 in some of Megatron's tokenizers.
        if (None if expected == -1 else expected) != given:
            return f"its {wanted} token would be {given}, Megatron's {name} is {expected}"
    names = controls_of(tokenizer) if tokenizer.library == "sentencepiece" else []
    for name in [] if saved.split_special_tokens else names:
        expected, given = tokenizer._tokenizer.tokenizer.piece_to_id(name), saved.encode(f"a{name}")[-1]
        if expected != given:
            return f"the text {name} would be the token {given}, Megatron's is {expected}"
    return None


def _text_difference(tokenizer: Any, saved: Any) -> str | None:
    unknown, ties = tokenizer.unk, has_ties(tokenizer)
    # Megatron does not find a sentencepiece model's control tokens in text; all else has to be the same.
    how = {"split_special_tokens": True} if tokenizer.library == "sentencepiece" else {}
    for text in _texts(tokenizer):
        expected, given = list(tokenizer.tokenize(text)), list(saved(text, **how)["input_ids"])
        if expected != given and not (ties and sorted(expected) == sorted(given)):
            at = next((i for i, (a, b) in enumerate(zip(expected, given, strict=False)) if a != b), None)
            at = min(len(expected), len(given)) if at is None else at
            return (
                f"{text!r} would become {given[at : at + 8]} from token {at} on, Megatron has {expected[at : at + 8]}"
            )
        # An unknown token has no text; every library shows its own sign.
        if unknown not in expected and (there := saved.decode(expected)) != (here := decode(tokenizer, expected)):
            return f"the tokens of {text!r} would be decoded as {there!r}, Megatron has {here!r}"
    return None


def _texts(tokenizer: Any) -> Iterator[str]:
    yield from _SAMPLES
    for name in _names(tokenizer):
        yield from (name, f"a{name}b", f" {name} {name}{name}  x", f"x\n{name}\n")
    source = random.Random(0)
    for _ in range(_RANDOM_TEXTS):
        yield tokenizer.detokenize([source.randrange(tokenizer.vocab_size) for _ in range(_RANDOM_LENGTH)])


def _names(tokenizer: Any) -> list[str]:
    """What is special in the vocabulary, as text: the tokens that a text may name without meaning them, and symbols."""
    library = tokenizer._tokenizer
    if tokenizer.library == "sentencepiece":
        model = library.tokenizer
        ordinary = range(model.get_piece_size())
        names = [model.id_to_piece(i) for i in ordinary if model.is_control(i) or model.is_unknown(i)]
        return names[:_NAMES] + symbols_of(tokenizer)[:_NAMES]
    if tokenizer.library == "tiktoken":
        return library.special_tokens[:_NAMES]
    return [str(token) for token in library.tokenizer.get_added_vocab()][:_NAMES]
