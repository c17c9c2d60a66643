"""What both encoders of a seed learn: masked tokens, of new sentences in each step."""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from examples.side_by_side.training import take_turns

from .data import Batch, batch, without_attention
from .models import encoders

#: Sentences in a step, and held out.
BATCH_SIZE, HELD_OUT = 16, 1024
#: Of the held-out sentences: one that no training seed is.
HELD_OUT_SEED = "held out"


class MaskedTokens:
    """Sentences of a seed; ``tokens`` counts those that were read.  A task of ``side_by_side/training.py``."""

    def __init__(self, seed: int, seq_length: int) -> None:
        self.held_out = batch(random.Random(HELD_OUT_SEED), HELD_OUT, seq_length).to("cuda")
        self.tokens = 0
        self._chance, self._seq_length = random.Random(seed), seq_length

    def next_batch(self) -> Batch:
        """:data:`BATCH_SIZE` sentences that are new."""
        sentences = batch(self._chance, BATCH_SIZE, self._seq_length)
        self.tokens += int(sentences.is_token.sum())
        return sentences.to("cuda")

    def loss(self, model: torch.nn.Module, sentences: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross entropy (nats) at the masked tokens, and how many of them the largest logit has right."""
        logits, _ = model(sentences.tokens, sentences.is_token.float())
        logits, labels = logits[sentences.is_masked], sentences.labels[sentences.is_masked]
        return torch.nn.functional.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()


def measure(args: Namespace, seed: int) -> dict[str, Any]:
    """One seed, of the weights and of the order of the data: what both models learned, and how fast."""
    task = MaskedTokens(seed, args.seq_length)
    row = take_turns(args, seed, encoders(args, seed), task)
    return row | {
        "tokens": task.tokens,
        "padded_tokens_a_step": BATCH_SIZE * args.seq_length,
        "held_out_masked_tokens": int(task.held_out.is_masked.sum()),
        "without_attention": without_attention(task.held_out),
    }
