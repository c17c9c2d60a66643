"""Megatron's tokenizers as tokenizers of the ``tokenizers`` library, with the same ids.

transformers' own converters guess at what sentencepiece's model file says outright: they drop its whitespace rules, and
make merges out of pieces that are none.  What is read here from the file is therefore more than they read; the models,
normalisers and decoders are the library's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "▁"
# sentencepiece's trainer_spec.model_type.
UNIGRAM, BPE = 1, 2
# sentencepiece's piece types: it finds only pieces of the first and the last of these in text.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
# A symbol is worth its length times the best score, less this; sentencepiece starts "the best score" at nearly 0.
SYMBOL_SCORE = -0.1
# Symbols hide from the character map behind characters of a plane that no map touches.
HIDDEN = 0xF0000
# More spaces than a text starts with.
MANY = 1 << 16
# What a saved tokenizer need not remember of where it came from.
ORIGIN = ("name_or_path", "vocab_file", "merges_file", "tokenizer_file", "is_local", "local_files_only")
# The class that takes tokenizer.json as it is, under the name that every version of transformers knows.
PLAIN_CLASS = "PreTrainedTokenizerFast"


class UnsupportedModel(Exception):
    """Why a tokenizer has no equivalent, as the end of a sentence about it."""


def save_tokenizer(tokenizer: Any, folder: Path, length: int | None = None, special_as_text: bool = False) -> None:
    """Write Megatron's ``tokenizer`` into ``folder`` as Hugging Face files.

    Args:
        tokenizer: Megatron's.
        folder: exists.
        length: tokens that the model takes, ``model_max_length``.
        special_as_text: the names of special tokens in a text are not those tokens, as sentencepiece has it.

    Raises:
        UnsupportedModel: if it has no equivalent.
    """
    library = tokenizer._tokenizer
    if special_as_text and tokenizer.library != "sentencepiece":
        raise UnsupportedModel("finds its special tokens in text in Megatron too (--special-tokens-as-text)")
    if tokenizer.library == "sentencepiece":
        _save_sentencepiece(tokenizer, folder, special_as_text)
    elif tokenizer.library == "tiktoken":
        equivalent = tiktoken_equivalent(library.token2id, library.special_tokens, library.tokenizer._pat_str)
        names = ("unk", "bos", "eos", "pad", "cls", "sep", "mask")
        special = {f"{name}_token": library.special_tokens[getattr(library, f"{name}_id")] for name in names}
        _save_plain(equivalent, folder, tokenizer.chat_template, special)
    elif tokenizer.library in ("huggingface", "megatron"):
        library.tokenizer.save_pretrained(folder)
        if not library.include_special_tokens:
            _drop_post_processor(folder)
    else:
        raise UnsupportedModel(f"is one of the library {tokenizer.library}")
    _edit(folder / "tokenizer_config.json", {**dict.fromkeys(ORIGIN), "model_max_length": length})


def has_ties(tokenizer: Any) -> bool:
    """Whether a text may have two best encodings: the same pieces in another order, as of ``---`` into ``-``, ``--``.

    So it is with unigram models. sentencepiece adds up scores in single precision, over all the text so far, and takes
    what rounding makes the larger sum; the ``tokenizers`` library adds in double precision, and takes the first. In a
    text of tens of thousands of tokens rounding may even cover a real, small difference between two encodings.
    """
    return tokenizer.library == "sentencepiece" and _proto(tokenizer).trainer_spec.model_type == UNIGRAM


def _proto(tokenizer: Any) -> Any:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    return ModelProto.FromString(tokenizer._tokenizer.tokenizer.serialized_model_proto())


def symbols_of(tokenizer: Any) -> list[str]:
    """The symbols that a sentencepiece model keeps whole, as its user defined them."""
    return [piece.piece for piece in _proto(tokenizer).pieces if piece.type == USER_DEFINED]


def controls_of(tokenizer: Any) -> list[str]:
    """The control tokens of a sentencepiece model, such as ``</s>``."""
    return [piece.piece for piece in _proto(tokenizer).pieces if piece.type == CONTROL]


def _save_sentencepiece(tokenizer: Any, folder: Path, special_as_text: bool) -> None:
    from tokenizers import AddedToken

    library = tokenizer._tokenizer
    if library.removed_extra_spaces and not library.ignore_extra_whitespaces:
        raise UnsupportedModel("keeps spaces (--tokenizer-sentencepiece-ignore-extra-whitespaces) its model removes")
    serialized = Path(tokenizer.path).read_bytes()
    equivalent = sentencepiece_equivalent(serialized)
    # As in every model on the Hub a text, such as a chat template's, may name a control token.
    names = controls_of(tokenizer)
    equivalent.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    ids = {"unk": library.unk_id, "bos": library.bos_id, "eos": library.eos_id, "pad": library.pad_id}
    special = {f"{name}_token": library.tokenizer.id_to_piece(i) for name, i in ids.items() if i >= 0}
    # In Megatron they are never found: a document that mentions </s> does not end there.
    more = {"split_special_tokens": True} if special_as_text else {}
    _save_plain(equivalent, folder, tokenizer.chat_template, special, **more)
    # Converters to other formats, and Megatron itself, read the original.
    (folder / "tokenizer.model").write_bytes(serialized)


def _save_plain(equivalent: Any, folder: Path, chat_template: str | None, special: dict[str, str], **more: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    if chat_template is not None:
        more["chat_template"] = chat_template
    saved = PreTrainedTokenizerFast(tokenizer_object=equivalent, clean_up_tokenization_spaces=False, **special, **more)
    saved.save_pretrained(folder)
    _edit(folder / "tokenizer_config.json", {"tokenizer_class": PLAIN_CLASS})


def _drop_post_processor(folder: Path) -> None:
    """Leave out what adds special tokens to an encoded text, as ``--tokenizer-hf-no-include-special-tokens`` does."""
    if (folder / "tokenizer.json").is_file():
        _edit(folder / "tokenizer.json", {"post_processor": None}, keep_none=True)
        plain = {"tokenizer_class": PLAIN_CLASS, "add_bos_token": None, "add_eos_token": None}
        _edit(folder / "tokenizer_config.json", plain)


def _edit(path: Path, changes: dict[str, Any], keep_none: bool = False) -> None:
    """Change entries of a JSON file; ``None`` takes an entry out, unless it is kept."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    content = {k: v for k, v in content.items() if keep_none or k not in changes or v is not None}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sentencepiece_equivalent(serialized: bytes) -> Tokenizer:
    """The equivalent of a sentencepiece model, given as the contents of its file.

    Texts encode the same, but for two cases of the library's own: ties of unigram models (``has_ties``), and, where the
    model maps characters (not ``identity``), combining marks that no composed character covers, such as one on ``²``.

    Raises:
        UnsupportedModel: if the model is neither unigram nor BPE.
    """
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(serialized)
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    if not proto.normalizer_spec.escape_whitespaces or proto.trainer_spec.treat_whitespace_as_suffix:
        raise UnsupportedModel("does not write spaces at the start of words")
    if proto.trainer_spec.model_type == UNIGRAM:
        tokenizer = _unigram(proto)
    elif proto.trainer_spec.model_type == BPE:
        tokenizer = _bpe(proto, symbols, _plain_encoder(SentencePieceProcessor, proto))
    else:
        raise UnsupportedModel("is of words or characters, not a unigram or BPE model")
    tokenizer.normalizer = _normalizer(proto.normalizer_spec, symbols)
    tokenizer.decoder = _decoder(proto)
    return tokenizer


def _unigram(proto: Any) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    known = {piece.piece for piece in proto.pieces if piece.type == NORMAL and len(piece.piece) == 1}
    scores = [piece.score for piece in proto.pieces if piece.type == NORMAL]
    # Text is looked up among all pieces, so the others are priced above any other way to write their names.
    longest = max(len(piece.piece) for piece in proto.pieces)
    never = (longest + 1) * (min(scores, default=0.0) - 10.0)
    score_of = {NORMAL: lambda score: score, USER_DEFINED: lambda score: SYMBOL_SCORE}
    vocabulary = [(piece.piece, score_of.get(piece.type, lambda score: never)(piece.score)) for piece in proto.pieces]
    unknown = proto.trainer_spec.unk_id
    byte_fallback = proto.trainer_spec.byte_fallback
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=byte_fallback))
    names = [piece.piece for piece in proto.pieces if piece.type not in (NORMAL, USER_DEFINED)]
    strange = {character for name in names for character in name} - known
    names = [name for name in names if not strange.isdisjoint(name)]
    if strange:
        # No price is low enough for a name with characters that have no piece: such a name is cut where one stands.
        cuts = _any_of(strange) if byte_fallback else "|".join(_cut(name, known) for name in names)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(cuts), behavior="isolated")
    return tokenizer


def _cut(name: str, known: set[str]) -> str:
    """A pattern for the first unknown characters in ``name``, with those around them: a run is one unknown token."""
    unknown = f"[^{''.join(map(_escape, sorted(known)))}]" if known else r"[\s\S]"
    start = next(i for i, character in enumerate(name) if character not in known)
    end = next((i for i in range(start, len(name)) if name[i] in known), len(name))
    before, run, after = map(_escape, (name[:start], name[start:end], name[end:]))
    if before:
        return f"(?<={before}){run}(?={after})" if after else f"(?<={before}){run}{unknown}*"
    return f"{unknown}*{run}(?={after})"


def _bpe(proto: Any, symbols: list[str], encode: Callable[[str], list[str]]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import generate_merges

    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = generate_merges({piece: vocabulary[piece] for piece in scores}, scores)
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    byte_fallback = proto.trainer_spec.byte_fallback
    long_symbols = [symbol for symbol in symbols if len(symbol) > 1]
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    if symbols:
        steps = [pre_tokenizers.Split(Regex(_any_of(symbols)), behavior="isolated")]
        if long_symbols:
            # No merges lead to a symbol of several characters, so what is a piece as a whole is taken as a whole.
            model.ignore_merges = True
            wrong = [name for name in vocabulary if name not in symbols and encode(name) != [name]]
            guards = [guard for name in wrong if (guard := _guard(name, encode, set(wrong)))]
            if guards:
                steps.append(pre_tokenizers.Split(Regex(rf"\A(?:{'|'.join(guards)})"), behavior="isolated"))
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def _guard(name: str, encode: Callable[[str], list[str]], wrong: set[str]) -> str | None:
    """A pattern for the head of ``name`` that keeps a text of this name, between symbols, from being taken whole."""
    pieces = encode(name)
    for cut in range(1, len(name)):
        head, tail = name[:cut], name[cut:]
        if wrong.isdisjoint((head, tail)) and encode(head) + encode(tail) == pieces:
            return f"{_escape(head)}(?={_escape(tail)}\\z)"
    return None


def _plain_encoder(processor: Callable[..., Any], proto: Any) -> Callable[[str], list[str]]:
    """How the model cuts a text that has been normalised already."""
    bare = type(proto)()
    bare.CopyFrom(proto)
    bare.normalizer_spec.precompiled_charsmap = b""
    bare.normalizer_spec.add_dummy_prefix = False
    bare.normalizer_spec.remove_extra_whitespaces = False
    model = processor(model_proto=bare.SerializeToString())
    return lambda text: model.encode(text, out_type=str)


def _normalizer(spec: Any, symbols: list[str]) -> Any:
    """What sentencepiece does to a text first: character map, spaces, the space before the first word."""
    from tokenizers import Regex, normalizers

    prefix = [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []
    # The space comes first, but where spaces are removed: there a text of nothing else has to stay without.
    steps: list[Any] = [] if spec.remove_extra_whitespaces else [*prefix]
    if spec.precompiled_charsmap:
        character_map = normalizers.Precompiled(spec.precompiled_charsmap)
        # Symbols are kept from the map, the longest first as sentencepiece looks for them.
        changed = sorted((s for s in symbols if character_map.normalize_str(s) != s), key=len, reverse=True)
        hidden = [(symbol, chr(HIDDEN + number)) for number, symbol in enumerate(changed)]
        steps += [normalizers.Replace(symbol, character) for symbol, character in hidden]
        if len(character_map.normalize_str("e\u0301")) == 1:
            # The map composes characters; the library's reading of it only those of at most five bytes.
            steps.append(normalizers.NFC())
        # The library takes a carriage return and a newline for one character, and maps only the first.
        steps.append(normalizers.Replace("\r", character_map.normalize_str("\r")))
        steps.append(character_map)
        steps += [normalizers.Replace(character, symbol) for symbol, character in hidden]
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +"), ""),
            normalizers.Replace(Regex(rf"[ {SPACE}]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
            *prefix,
        ]
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(proto: Any) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " ")]
    if proto.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    spec = proto.normalizer_spec
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(content=" ", left=MANY if spec.remove_extra_whitespaces else 1, right=0))
    return decoders.Sequence(steps)


def tiktoken_equivalent(ranks: dict[bytes, int], special_tokens: list[str], pattern: str) -> Tokenizer:
    """The equivalent of a tiktoken encoding whose first ids are ``special_tokens``."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: Any) -> dict[bytes, int]:
            return ranks

        def tokenizer(self) -> Tokenizer:
            vocabulary, merges = self.extract_vocab_merges_from_model("")
            # Before the others: a byte sequence that spells a special token can never be reached.
            vocabulary |= {token: number for number, token in enumerate(special_tokens)}
            return Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))

    tokenizer = Converter(pattern=pattern).converted()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    return tokenizer


def _any_of(texts: Iterable[str]) -> str:
    return "|".join(map(_escape, sorted(texts, key=len, reverse=True)))


def _escape(text: str) -> str:
    """``text`` as a pattern of the regular expressions of the ``tokenizers`` library."""
    return re.escape(text)
