"""Tokenizers without Megatron have the ids, sizes and ends that Megatron's have, and the index its numbers."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from sla_megatron.commands.data.index_format import dtype_of
from sla_megatron.commands.data.plain_tokenizers import build_for_data, imported_for
from sla_megatron.common.tokenizers import DEFAULTS, TokenizerError, build, decode
from tests.support.tokenizers import byte_level, hugging_face_folder, train_sentencepiece

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = [
    "",
    " ",
    "a  b \n\n c\t",
    "naïve Straße 中文 😀 \u2581 \x00 \ufeff",
    "x</s>y <s> <|endoftext|> <|endoftext|>  <extra> [CLS] z",
    "word " * 300,
]


def special(folder: Path, **names: object) -> str:
    """A tokenizer of transformers with these special tokens."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=byte_level(), **names).save_pretrained(folder)
    return str(folder)


def shortening(folder: Path) -> str:
    """One whose file asks for texts to be cut and filled up, which transformers does not do to them."""
    from tokenizers import Tokenizer

    special(folder, eos_token="<|endoftext|>")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=7)
    backend.save(str(folder / "tokenizer.json"))
    return str(folder)


def stripping() -> object:
    from tokenizers import AddedToken

    return AddedToken("<|endoftext|>", lstrip=True, rstrip=True)


SP, HF = "SentencePieceTokenizer", "HuggingFaceTokenizer"
PLAIN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "bpe": (SP, lambda f: train_sentencepiece(f / "t.model", model_type="bpe", byte_fallback=True, eos_id=2, pad_id=3)),
    "unigram": (SP, lambda f: train_sentencepiece(f / "t.model")),
    "no-end": (SP, lambda f: train_sentencepiece(f / "t.model", eos_id=-1)),
    "begins": (HF, lambda f: hugging_face_folder(f / "hf")),
    "end-alone": (HF, lambda f: special(f / "hf", eos_token="<|endoftext|>")),
    "end-strips": (HF, lambda f: special(f / "hf", eos_token=stripping(), bos_token="[CLS]")),
    "cls": (HF, lambda f: special(f / "hf", eos_token="<|endoftext|>", cls_token="[CLS]", sep_token="</s>")),
    "shortens": (HF, lambda f: shortening(f / "hf")),
    "extra": (HF, lambda f: special(f / "hf", eos_token="<|endoftext|>", extra_special_tokens=["<extra>"])),
}


@pytest.mark.parametrize("name", PLAIN)
def test_as_megatrons(name: str, tmp_path: Path) -> None:
    kind, make = PLAIN[name]
    settings = Namespace(**{**DEFAULTS, "tokenizer_type": kind, "tokenizer_model": str(make(tmp_path))})
    plain, megatrons = build_for_data(settings), build(settings)
    assert type(plain).__module__.endswith(".plain_tokenizers")
    assert (plain.vocab_size, plain.eod) == (megatrons.vocab_size, megatrons.eod)
    for text in TEXTS:
        ids = megatrons.tokenize(text)
        assert plain.tokenize(text) == ids
        assert decode(plain, ids) == decode(megatrons, ids)


MEGATRONS: dict[str, Callable[[Path], dict[str, object]]] = {
    # It has an end, but Megatron takes the separator's name for it.
    "separator": lambda f: {"tokenizer_type": HF, "tokenizer_model": special(f / "hf", sep_token="<|endoftext|>")},
    "added": lambda f: {
        **{"tokenizer_type": HF, "tokenizer_model": str(hugging_face_folder(f / "hf"))},
        "special_tokens": ["<new>"],
    },
    "legacy": lambda f: {
        **{"tokenizer_type": SP, "tokenizer_model": str(train_sentencepiece(f / "t.model"))},
        **{"tokenizer_sentencepiece_legacy": True, "special_tokens": ["<new>"]},
    },
}


@pytest.mark.parametrize("name", MEGATRONS)
def test_all_else_is_megatrons_own(name: str, tmp_path: Path) -> None:
    settings = {**DEFAULTS, **MEGATRONS[name](tmp_path)}
    assert type(build_for_data(Namespace(**settings))).__module__.startswith("megatron.")
    # That one has no end is known when it has been built.
    assert imported_for(settings).endswith(".megatron_imports") == (name != "separator")


@pytest.mark.parametrize("kind", [SP, HF])
def test_what_is_not_there(kind: str, tmp_path: Path) -> None:
    settings = Namespace(**{**DEFAULTS, "tokenizer_type": kind, "tokenizer_model": str(tmp_path / "none")})
    with pytest.raises(TokenizerError, match=f"^{kind} {tmp_path}/none cannot be read: [^\n]*$"):
        build_for_data(settings)


@pytest.mark.parametrize("size", [1, 256, 65499, 65500, 65501, 128_256])
def test_the_type_of_ids(size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert dtype_of(size) == DType.optimal_dtype(size)
