"""Megatron's own vision transformer, ``CLIPViTModel``, as a classifier, dense and with skip-layer attention."""

from __future__ import annotations

from argparse import Namespace

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from examples.side_by_side.models import dense_and_sla

from .data import CLASSES


class Classifier(torch.nn.Module):
    """The vision transformer, and what reads the class off its class token: a norm and a matrix.

    Megatron's model ends after its last layer, without a norm.  The head is whole on each tensor-parallel rank.
    """

    def __init__(self, vision: CLIPViTModel, hidden: int) -> None:
        super().__init__()
        self.vision = vision
        self.norm = torch.nn.LayerNorm(hidden)
        self.head = torch.nn.Linear(hidden, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[b, 3, height, width]`` images to ``[b, classes]`` logits."""
        return self.head(self.norm(self.vision(pixels)[:, 0]))


def classifiers(args: Namespace, seed: int, side: int) -> dict[str, Classifier]:
    """Both, of the same weights, for images of ``side`` x ``side`` pixels."""

    def build(config: TransformerConfig, spec: ModuleSpec) -> Classifier:
        vision = CLIPViTModel(
            config,
            spec,
            # Without Transformer Engine the default is torch's own norm, which takes none of Megatron's arguments.
            ln_pre_impl=WrappedTorchNorm,
            patch_dim=args.patch,
            img_h=side,
            img_w=side,
        )
        return Classifier(vision, config.hidden_size)

    return dense_and_sla(args, seed, CLIPViTModel, get_vit_layer_with_local_spec(), build)
