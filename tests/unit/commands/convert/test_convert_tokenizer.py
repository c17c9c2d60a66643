"""Carrying a tokenizer: what ``AutoTokenizer`` loads gives the ids that Megatron's own tokenizer gives."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from sla_megatron.commands.convert import tokenizer as carried
from sla_megatron.commands.convert import tokenizer_formats
from sla_megatron.commands.convert.tokenizer import carry_tokenizer, vocabulary_size
from sla_megatron.commands.convert.tokenizer_formats import has_ties
from sla_megatron.commands.data.training_tokenizer import ModelSettings, train_model
from sla_megatron.common import tokenizers
from sla_megatron.common.tokenizers import TokenizerError
from tests.support.tokenizers import (
    CORPUS,
    byte_level,
    gpt2_files,
    hugging_face_folder,
    tiktoken_file,
    train_sentencepiece,
)

pytestmark = pytest.mark.usefixtures("megatron_imported")

SYMBOLS = ["\n", "<|im_start|>", "<|im|>", "①", "SYM"]
IDS = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}
AS_IT_IS = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}

SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe"},
    "bpe-bytes-symbols": {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": SYMBOLS, **IDS},
    "bpe-llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    },
    "bpe-as-it-is": {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": SYMBOLS, **AS_IT_IS, **IDS},
    "bpe-spaces-kept": {"model_type": "bpe", "remove_extra_whitespaces": False, **IDS},
    "bpe-other-ids": {
        "model_type": "bpe",
        "control_symbols": ["<c1>", "pad"],
        "user_defined_symbols": ["<s1>", "<s1>x"],
        "unk_id": 5,
        "bos_id": -1,
        "eos_id": 0,
    },
    "unigram": {"model_type": "unigram"},
    "unigram-bytes-symbols": {"model_type": "unigram", "byte_fallback": True, "user_defined_symbols": SYMBOLS, **IDS},
    "unigram-few-characters": {
        "model_type": "unigram",
        "without": "<>",
        "user_defined_symbols": ["ab"],
        "control_symbols": ["pad", "x<"],
    },
    "unigram-few-characters-bytes": {"model_type": "unigram", "without": "<>", "byte_fallback": True},
    "unigram-as-it-is": {"model_type": "unigram", "byte_fallback": True, **AS_IT_IS, **IDS},
    "unigram-lower-case": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf"},
    "unigram-across-words": {"model_type": "unigram", "split_by_whitespace": False, "normalization_rule_name": "nfkc"},
}
# The library maps marks that stand on a character which the map changes in another way than sentencepiece.
MAPPED = [name for name, options in SENTENCEPIECE.items() if "identity" not in options.values()]

FRAGMENTS = [
    *SYMBOLS,
    *(
        "<s>",
        "</s>",
        "x<",
        "padding",
        "<unk>",
        "<pad>",
        "<mask>",
        "<0x41>",
        "<s1>",
        "<s1>x",
        "<c1>",
        "pad",
        "<|endoftext|>",
        "ab",
    ),
    *(" ", "  ", "   ", "\t", "\r\n", "▁", "\u00a0", "\u3000", "\u2028", "\u200b", "\x00", "\x01", "\ufeff"),
    *("hello", "World", "def f(x):", "    return", "don't", "café", "e\u0301", "か\u3099", "\u1112\u1161\u11ab", "ß"),
    *("中文", "한국어", "😀", "👩‍👩‍👧", "ﬁ", "½", "Ａ", "İ", "0123", "1", "==", "---", "<", "s>", "_", "x\n\n"),
]


def texts(marks: bool) -> st.SearchStrategy[str]:
    """Texts with what tokenizers treat specially; any character at all, or all but combining marks."""
    excluded = ("Cs",) if marks else ("Cs", "Mn", "Mc", "Me")
    characters = st.text(st.characters(exclude_categories=excluded), max_size=4)
    return st.lists(st.sampled_from(FRAGMENTS) | characters, max_size=12).map("".join)


def megatrons(args: Namespace) -> Any:
    return carried._megatron_tokenizer(carried._settings(args, None))


def check(args: Namespace, folder: Path, marks: bool = True, examples: int = 60) -> tuple[Any, Any]:
    """Carry the tokenizer and compare random texts; returns Megatron's tokenizer and the one from the folder."""
    from transformers import AutoTokenizer

    carry_tokenizer(args, folder)
    # What AutoTokenizer does depends on the model's configuration, too.
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours, saved = megatrons(args), AutoTokenizer.from_pretrained(folder)
    # sentencepiece finds no control token in a text.
    how = {"split_special_tokens": True} if ours.library == "sentencepiece" else {}

    @settings(max_examples=examples, database=None, derandomize=True)
    @given(texts(marks))
    def same(text: str) -> None:
        expected = list(ours.tokenize(text))
        ids = saved(text, **how)["input_ids"]
        # A unigram model may have two best encodings: the same pieces in another order.
        assert ids == expected or (has_ties(ours) and sorted(ids) == sorted(expected))
        if ours.unk not in expected and ours.library == "sentencepiece":
            assert saved.decode(expected) == ours.detokenize(expected)

    same()
    assert vocabulary_size(args) == ours.vocab_size == len(saved)
    return ours, saved


def no_trace(folder: Path, of: Path) -> None:
    for path in folder.iterdir():
        assert str(of).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece(name: str, tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "a.model", **SENTENCEPIECE[name])
    args = Namespace(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(model))
    ours, saved = check(args, tmp_path / "out", marks=name not in MAPPED)
    for token, given_id in [
        (ours.eod, saved.eos_token_id),
        (ours.bos, saved.bos_token_id),
        (ours.pad, saved.pad_token_id),
    ]:
        assert (None if token == -1 else token) == given_id
    assert saved.unk_token_id == ours.unk
    no_trace(tmp_path / "out", tmp_path)


def test_model_of_sla_data_gives_back_every_text(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(train_model(["\n".join(CORPUS).encode()], ModelSettings(600)))
    args = Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "a.model"))
    _, saved = check(args, tmp_path / "out", examples=150)
    text = "def f(x):\n    return x  # é 中 😀 </s>\n"
    assert saved.decode(saved(text)["input_ids"]) == text
    assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (1, 2, 3)


def test_literal_names_of_control_tokens_stay_text_on_request(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "a.model", **SENTENCEPIECE["unigram"])
    _, saved = check(Namespace(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(model)), tmp_path / "out", False)
    assert saved.eos_token_id not in saved("the end</s>", split_special_tokens=True)["input_ids"]
    assert saved.decode(saved("a<tag>b")["input_ids"]) == "a<tag>b"


def test_gpt2_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = carried.build

    def without_gpt2(settings: Namespace) -> Any:
        if settings.tokenizer_type == "GPT2BPETokenizer":
            raise TokenizerError("neither the Hub nor its cache has it")
        return build(settings)

    monkeypatch.setattr(tokenizers, "_answers", lambda endpoint: False)
    monkeypatch.setattr(carried, "build", without_gpt2)
    args = gpt2_files(tmp_path / "in")
    ours, saved = check(args, tmp_path / "out", examples=150)
    assert ours.eod == saved.eos_token_id == saved.convert_tokens_to_ids("<|endoftext|>")
    assert saved.pad_token_id is None
    no_trace(tmp_path / "out", tmp_path)
    moved = gpt2_files(tmp_path / "moved")
    assert vocabulary_size(Namespace(**{**vars(args), "vocab_file": "gone"}), moved.vocab_file) == ours.vocab_size
    assert vocabulary_size(Namespace(**{**vars(args), "vocab_file": "gone"}), str(tmp_path / "moved")) == len(saved)
    with pytest.raises(TokenizerError, match="the checkpoint those of the Hub's gpt2"):
        vocabulary_size(Namespace(**vars(args), padded_vocab_size=50304))


def test_gpt2_is_megatrons_own_where_that_is_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer.json that comes with ``gpt2`` beats the two files: Megatron trains with it, so it is carried."""
    monkeypatch.chdir(tmp_path)
    args = gpt2_files(tmp_path / "in")
    hugging_face_folder(tmp_path / "gpt2")
    byte_level().save(str(tmp_path / "gpt2" / "tokenizer.json"))
    vocabulary = json.loads(Path(args.vocab_file).read_text())
    Path(args.vocab_file).write_text(json.dumps({token: len(vocabulary) - 1 - i for token, i in vocabulary.items()}))
    _, saved = check(args, tmp_path / "out")
    assert saved.convert_tokens_to_ids("<|endoftext|>") == 0


@pytest.mark.parametrize("include", [True, False])
def test_hugging_face_folder(include: bool, tmp_path: Path) -> None:
    args = Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(hugging_face_folder(tmp_path / "in")),
        tokenizer_hf_no_include_special_tokens=not include,
        special_tokens=["<|call|>", "<|reply|>"],
        chat_template="{{ messages[0].content }}",
    )
    ours, saved = check(args, tmp_path / "out", examples=150)
    assert (saved("x")["input_ids"][0] == saved.bos_token_id) == include
    assert saved("<|call|>")["input_ids"][-1] == ours.vocab_size - 2
    assert saved.eos_token_id == ours.eod
    assert saved.chat_template == args.chat_template
    no_trace(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("pattern", [None, "v1", "v2"])
def test_tiktoken(pattern: str | None, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    args = tiktoken_file(tmp_path / "vocab.json", special=20)
    args.tiktoken_pattern = pattern
    args.special_tokens = ["<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>", "<|im|>"]
    ours, saved = check(args, tmp_path / "out", examples=150)
    special = (ours.eod, ours.bos, ours.pad, ours.unk)
    assert special == (saved.eos_token_id, saved.bos_token_id, saved.pad_token_id, saved.unk_token_id)
    # Here a text may name them: Megatron's own encoding allows it.
    assert saved("a</s><|im|><SPECIAL_19>")["input_ids"][1:] == [ours.eod, 7, 19]
    assert saved.decode(saved("é</s> 中")["input_ids"]) == "é</s> 中"


def test_nothing_to_carry(tmp_path: Path) -> None:
    args = Namespace(tokenizer_type="NullTokenizer", vocab_size=255)
    assert carry_tokenizer(args, tmp_path).startswith("none (NullTokenizer")
    assert not list(tmp_path.iterdir())
    assert vocabulary_size(args) == 255


def test_moved_model(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "a.model", **SENTENCEPIECE["bpe"])
    args = Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model="/gone/t.model")
    assert str(model) in carry_tokenizer(args, tmp_path / "out", str(model))
    assert vocabulary_size(args, str(model)) == sentencepiece.SentencePieceProcessor(str(model)).get_piece_size()


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer"])
def test_missing_model(kind: str, tmp_path: Path) -> None:
    args = Namespace(tokenizer_type=kind, tokenizer_model="/gone/t.model")
    message = "tokenizer model /gone/t.model of the checkpoint is not there: --tokenizer-model PATH"
    with pytest.raises(TokenizerError, match=message):
        carry_tokenizer(args, tmp_path)
    with pytest.raises(TokenizerError, match=message):
        vocabulary_size(args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "the checkpoint names no tokenizer"),
        ({"tokenizer_type": "SFTTokenizer"}, "--tokenizer-type SFTTokenizer has no Hugging Face form: expected one of"),
        ({"tokenizer_type": "BertWordPieceCase"}, "BertWordPieceCase has no Hugging Face form"),
        ({"tokenizer_type": "TikTokenizer"}, "TikTokenizer has no model: --tokenizer-model PATH"),
        (
            {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_sentencepiece_legacy": True},
            "--tokenizer-sentencepiece-legacy has no Hugging Face form",
        ),
    ],
)
def test_what_cannot_be_carried(args: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        carry_tokenizer(Namespace(**args), tmp_path)


def test_models_without_an_equivalent(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "a.model", model_type="bpe", treat_whitespace_as_suffix=True)
    args = Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    with pytest.raises(TokenizerError, match="cannot be carried along: it does not write spaces at the start of words"):
        carry_tokenizer(args, tmp_path / "out")
    args.tokenizer_sentencepiece_ignore_extra_whitespaces = False
    with pytest.raises(TokenizerError, match="--tokenizer-sentencepiece-ignore-extra-whitespaces"):
        carry_tokenizer(args, tmp_path / "out")


def test_tokenizer_of_another_checkpoint(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "a.model", **SENTENCEPIECE["bpe"])
    args = Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model), padded_vocab_size=128)
    with pytest.raises(TokenizerError, match="the checkpoint's vocabulary 128: it is not the tokenizer"):
        vocabulary_size(args)


def test_a_wrong_tokenizer_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import normalizers

    model = train_sentencepiece(tmp_path / "a.model", **SENTENCEPIECE["bpe"])
    args = Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").touch()
    # As transformers' converter for models without a class of their own has it: no space before the first word.
    monkeypatch.setattr(tokenizer_formats, "_normalizer", lambda spec, symbols: normalizers.Replace(" ", "▁"))
    with pytest.raises(TokenizerError, match="would become .* Megatron has"):
        carry_tokenizer(args, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["other"]


def test_ids_with_holes(tmp_path: Path) -> None:
    """Megatron counts tokens; the vocabulary has to reach the highest id, or special tokens would be beyond it."""
    from transformers import AutoTokenizer

    hugging_face_folder(tmp_path / "in", pad_token="<pad>")
    path = tmp_path / "in" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["<pad>"] = 900
    for token in content["added_tokens"]:
        token["id"] = 900 if token["content"] == "<pad>" else token["id"]
    path.write_text(json.dumps(content))
    args = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "in"))
    carry_tokenizer(args, tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.pad_token_id == 900 and len(saved) < 900 and vocabulary_size(args) == 901
    with pytest.raises(
        TokenizerError, match="has 901 tokens, the checkpoint's vocabulary 896: it is not the tokenizer"
    ):
        vocabulary_size(Namespace(**vars(args), padded_vocab_size=896))
