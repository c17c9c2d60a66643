"""A text, a tokenizer of it, questions about it, and what examples/evaluate says of them."""

from __future__ import annotations

import re
from pathlib import Path

from .launch import ROOT

README = (ROOT / "examples" / "evaluate" / "README.md").read_text()

# With a character of two bytes and a line end of two.
TEXT = 4 * (
    "It was a bright cold day in spring, and the clocks were striking. A smell of cabbage and old mats met him\r\n"
    "on the stairs; the café below was shut, and nobody had come up since the lights went out.\n"
)
QUESTIONS = [
    {"question": "It was a bright", "choices": ["cold day", "café", "smell of old mats"], "answer": 0},
    {"question": "the clocks", "choices": ["were striking", "went out"], "answer": 0},
    {"question": "on", "choices": ["him", "the stairs; the lights went out."], "answer": 1},
    {"question": "A smell of cabbage and old mats met", "choices": ["nobody", "him"], "answer": 1},
]


def block(start: str) -> str:
    """The README's block that begins so."""
    (found,) = [b for b in re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL) if b.startswith(start)]
    return found


def save_tokenizer(folder: Path) -> None:
    """The checkpoint is one of NullTokenizer: this one is small enough for its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)
