"""``tests/reference.py`` for a vision transformer: patches of an image, each of which sees every other.

The layers are the decoder's; only what goes into them, who sees whom and the end differ.  Weights carry the names of
Megatron's ``CLIPViTModel``.  Shapes as there: b batch, s sequence, h hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference import ReferenceGPT


@dataclass(frozen=True)
class ReferenceVision(ReferenceGPT):
    """The model's shape and its skip-layer attention, as for the decoder."""

    def hidden(self, w: dict[str, Tensor], images: Tensor) -> Tensor:
        """``[b, 3, height, width]`` images to ``[b, 1 + patches, h]``: the class token, then patches row by row.

        The last layer's output; no norm follows it.
        """
        size = w["conv1.weight"].shape[-1]
        patches = [
            images[:, :, top : top + size, left : left + size].flatten(1)
            for top in range(0, images.shape[2], size)
            for left in range(0, images.shape[3], size)
        ]
        x = torch.stack(patches, dim=1) @ w["conv1.weight"].flatten(1).T
        x = torch.cat([w["class_token"].expand(len(images), -1, -1), x], dim=1) + w["position_embeddings.weight"]
        nobody = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        return self._layers(w, "decoder.", self._norm(w, "ln_pre", x), nobody)
