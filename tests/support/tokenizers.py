"""Small tokenizers of every kind that Megatron reads, trained on the spot."""

from __future__ import annotations

import base64
import io
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import sentencepiece

from sla_megatron.commands.convert import tokenizer as carried
from sla_megatron.commands.convert import tokenizer_formats

CORPUS = [
    line
    for module in (carried, tokenizer_formats)
    for line in Path(module.__file__).read_text(encoding="utf-8").splitlines()
    if line.strip()
] + [
    "naïve café, Straße; 中文 日本語 한국어 😀 ① ½",
    "a  b   c    d",
    "------ ====== aaaa",
    "<tag> </tag> x < y > z",
] * 20


def train_sentencepiece(path: Path, without: str = "", **options: Any) -> Path:
    """A model of the corpus, in which the characters ``without`` do not occur."""
    model = io.BytesIO()
    drop = str.maketrans("", "", without)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line.translate(drop) for line in CORPUS),
        model_writer=model,
        vocab_size=900,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def byte_level() -> Any:
    """A byte-level BPE, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def gpt2_files(folder: Path) -> Namespace:
    folder.mkdir(exist_ok=True)
    byte_level().model.save(str(folder))
    files = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
    return Namespace(tokenizer_type="GPT2BPETokenizer", **files)


def hugging_face_folder(folder: Path, **special: str) -> Path:
    """A folder whose tokenizer puts <|endoftext|> in front of every text, as many do with their first token."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_level()
    end = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[end]
    )
    names = {"bos_token": end[0], "eos_token": end[0], **special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def tiktoken_file(path: Path, special: int = 1000) -> Namespace:
    """Megatron's JSON form: the 256 bytes, then what merges make of them, in the order of the merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    merges = json.loads(byte_level().to_str())["model"]["merges"]
    tokens = [bytes([i]) for i in range(256)]
    tokens += [bytes(byte_of[character] for character in "".join(pair)) for pair in merges]
    entry = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": t.decode(errors="replace")}
        for i, t in enumerate(dict.fromkeys(tokens))
    ]
    path.write_text(json.dumps(entry))
    return Namespace(
        tokenizer_type="TikTokenizer",
        tokenizer_model=str(path),
        vocab_size=special + len(entry),
        tiktoken_num_special_tokens=special,
    )
