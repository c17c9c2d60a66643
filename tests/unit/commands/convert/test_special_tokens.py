"""Special tokens of a carried tokenizer: a text may name them, as with every model on the Hub, unless it is to be split
as in pretraining."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sla_megatron.commands.convert.tokenizer import carry_tokenizer
from sla_megatron.common.tokenizers import DEFAULTS, TokenizerError, build
from tests.support.tokenizers import gpt2_files, hugging_face_folder, tiktoken_file, train_sentencepiece

pytestmark = [pytest.mark.usefixtures("megatron_imported"), pytest.mark.filterwarnings("ignore")]

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
IDS = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3, "control_symbols": ["<|turn|>"]}
LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def sentencepiece(kind: str, **options: Any) -> Callable[[Path], Namespace]:
    def make(folder: Path) -> Namespace:
        model = train_sentencepiece(folder / "a.model", **IDS, **options)
        return Namespace(tokenizer_type=kind, tokenizer_model=str(model), chat_template=CHAT)

    return make


def hugging_face(folder: Path) -> Namespace:
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    model = hugging_face_folder(folder / "in", **special)
    return Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(model),
        chat_template=CHAT,
        special_tokens=["<|turn|>"],
        tokenizer_hf_no_include_special_tokens=True,
    )


def tiktoken(folder: Path) -> Namespace:
    args = tiktoken_file(folder / "vocab.json", special=20)
    args.special_tokens = ["<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>", "<|turn|>"]
    args.chat_template = CHAT
    return args


TOKENIZERS: dict[str, Callable[[Path], Namespace]] = {
    "bpe": sentencepiece("SentencePieceTokenizer", model_type="bpe"),
    "bpe, as Llama's": sentencepiece("Llama2Tokenizer", model_type="bpe", **LLAMA),
    "unigram": sentencepiece("GPTSentencePieceTokenizer", model_type="unigram"),
    "unigram, symbols": sentencepiece(
        *("GPTSentencePieceTokenizer",), model_type="unigram", byte_fallback=True, user_defined_symbols=["<|sym|>"]
    ),
    "Hugging Face": hugging_face,
    "tiktoken": tiktoken,
}


def ids_of(args: Namespace) -> dict[str, int]:
    """The ids of special tokens, as Megatron's own tokenizer has them."""
    tokenizer = build(Namespace(**{**DEFAULTS, **vars(args)}))
    library = tokenizer._tokenizer
    find = library.tokenizer.piece_to_id if tokenizer.library == "sentencepiece" else library.token_to_id
    return {name: find(name) for name in ("<s>", "</s>", "<pad>", "<|turn|>")}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_are_found_in_text(name: str, tmp_path: Path) -> None:
    """Once carried, and once saved and loaded again by transformers."""
    from transformers import AutoTokenizer

    args = TOKENIZERS[name](tmp_path)
    args.max_position_embeddings = 24
    carry_tokenizer(args, tmp_path / "out")
    ids = ids_of(args)
    carried = AutoTokenizer.from_pretrained(tmp_path / "out")
    carried.save_pretrained(tmp_path / "again")
    for tokenizer in (carried, AutoTokenizer.from_pretrained(tmp_path / "again")):
        for token, expected in ids.items():
            assert tokenizer.convert_tokens_to_ids(token) == expected
            found = tokenizer(f"one {token} two{token}")["input_ids"]
            assert found.count(expected) == 2 and found[-1] == expected, token
        # One id a token, at both ends of each turn, and the rest as it is without them.
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a < b"}]
        chat = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert [i for i in chat if i in ids.values()] == [ids["<s>"], ids["</s>"]] * 2
        turns = [tokenizer("user: hello")["input_ids"], tokenizer("assistant: a < b")["input_ids"]]
        assert chat == [i for turn in turns for i in (ids["<s>"], *turn, ids["</s>"])]
        text = tokenizer.decode(chat, skip_special_tokens=True)
        assert text.split() == "user: hello assistant: a < b".split() or text == "user: helloassistant: a < b"
        assert "</s>" in tokenizer.decode(chat)
        assert tokenizer.model_max_length == 24
        assert len(tokenizer("word " * 100, truncation=True)["input_ids"]) == 24
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
        # Whoever wants pretraining's way for one text asks for it.
        assert ids["</s>"] not in tokenizer("the end</s>", split_special_tokens=True)["input_ids"]


def test_gpt2_is_the_same_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    from sla_megatron.common import tokenizers

    monkeypatch.setattr(tokenizers, "_answers", lambda endpoint: False)
    args = gpt2_files(tmp_path / "in")
    args.max_position_embeddings = 24
    carry_tokenizer(args, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a<|endoftext|>")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("a<|endoftext|>b")["input_ids"], skip_special_tokens=True) == "ab"
    assert tokenizer.model_max_length == 24


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in ("Hugging Face", "tiktoken")])
def test_special_tokens_as_text(name: str, tmp_path: Path) -> None:
    """As sentencepiece itself splits them, after a reload too."""
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    args = TOKENIZERS[name](tmp_path)
    carry_tokenizer(args, tmp_path / "out", special_as_text=True)
    model = SentencePieceProcessor(model_file=args.tokenizer_model)
    carried = AutoTokenizer.from_pretrained(tmp_path / "out")
    carried.save_pretrained(tmp_path / "again")
    for tokenizer in (carried, AutoTokenizer.from_pretrained(tmp_path / "again")):
        for text in ("the end</s>", "<s>user: hello</s>", "a <|turn|> b<pad>", "</s>"):
            assert tokenizer(text)["input_ids"] == model.encode(text)


@pytest.mark.parametrize("name", ["Hugging Face", "tiktoken"])
def test_where_pretraining_finds_them_too(name: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"finds its special tokens in text in Megatron too \(--special-tokens-as"):
        carry_tokenizer(TOKENIZERS[name](tmp_path), tmp_path / "out", special_as_text=True)
    assert not list((tmp_path / "out").iterdir())
