"""``tests/reference.py`` for an encoder: every token that is not padding sees every other, before and after it.

The layers are the decoder's; only who sees whom, the names and the head differ.  Weights carry the names of Megatron's
``BertModel``.  Shapes as there: b batch, s sequence, h hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import ReferenceGPT


@dataclass(frozen=True)
class ReferenceEncoder(ReferenceGPT):
    """The model's shape and its skip-layer attention, as for the decoder."""

    def logits(self, w: dict[str, Tensor], tokens: Tensor, is_token: Tensor | None = None) -> Tensor:
        """``[b, s]`` tokens to ``[b, s, vocabulary]`` logits; ``is_token`` ``[b, s]`` is False at padding.

        What it says at padding has no meaning.
        """
        is_token = torch.ones_like(tokens, dtype=torch.bool) if is_token is None else is_token
        x = self._block(w, "encoder.", self._embedding(w, tokens), ~is_token[:, None, :])
        x = self._norm(w, "lm_head.layer_norm", F.gelu(self._linear(w, "lm_head.dense", x)))
        return x @ w.get("output_layer.weight", w["embedding.word_embeddings.weight"]).T + w["output_layer.bias"]
