"""Sentences of nested brackets, made on the spot, and masked tokens to predict.

A sentence opens and closes brackets of :data:`KINDS` kinds; each closes the innermost one that is open, and at the end
all are closed.  The kind of a masked bracket stands at its partner, before it or after it and up to a sentence away: to
find it, a model has to look both ways and count.  Without attention nothing is better than the brackets' frequencies.

Shapes: b batch, s sequence.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS, DEPTH = 4, 6
PADDING, MASK, OPEN, CLOSE = 0, 1, 2, 2 + KINDS
VOCABULARY = 2 + 2 * KINDS

#: As BERT's; each masked token becomes MASK.
MASKED_SHARE = 0.15


@dataclass(frozen=True)
class Batch:
    """Sentences with masked tokens, each ``[b, s]``.

    Attributes:
        tokens: what the model reads; :data:`PADDING` after a sentence's end.
        is_token: False at padding.
        is_masked: where a token is to be predicted.
        labels: the sentences themselves.
    """

    tokens: Tensor
    is_token: Tensor
    is_masked: Tensor
    labels: Tensor

    def to(self, device: str) -> Batch:
        """The batch on ``device``."""
        return Batch(*(tensor.to(device) for tensor in (self.tokens, self.is_token, self.is_masked, self.labels)))


def sentence(chance: random.Random, length: int) -> list[int]:
    """``length`` tokens (even, 2 or more), nested :data:`DEPTH` deep at most."""
    tokens: list[int] = []
    opened: list[int] = []
    for left in range(length, 0, -1):
        may_open = left > len(opened) and len(opened) < DEPTH
        if not opened or (may_open and chance.random() < 0.5):
            opened.append(chance.randrange(KINDS))
            tokens.append(OPEN + opened[-1])
        else:
            tokens.append(CLOSE + opened.pop())
    return tokens


def batch(chance: random.Random, size: int, longest: int) -> Batch:
    """``size`` sentences of half of ``longest`` tokens to all of it, one masked token or more in each."""
    labels = torch.full((size, longest), PADDING)
    is_masked = torch.zeros(size, longest, dtype=torch.bool)
    for row in range(size):
        words = sentence(chance, 2 * chance.randint(max(1, longest // 4), longest // 2))
        labels[row, : len(words)] = torch.tensor(words)
        count = max(1, round(MASKED_SHARE * len(words)))
        is_masked[row, chance.sample(range(len(words)), count)] = True
    return Batch(labels.masked_fill(is_masked, MASK), labels != PADDING, is_masked, labels)


def without_attention(held_out: Batch) -> dict[str, float]:
    """Loss (nats) and accuracy at the masked tokens of who knows how often each token occurs, and nothing else."""
    counts = torch.bincount(held_out.labels[held_out.is_masked], minlength=VOCABULARY).double()
    shares = counts / counts.sum()
    return {"loss": float(-torch.xlogy(shares, shares).sum()), "accuracy": float(shares.max())}
