"""What both vision transformers of a seed learn: which digit an image shows."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from examples.side_by_side.training import take_turns

from .data import Images, batches, load, split
from .models import classifiers

#: Images in a step.
BATCH_SIZE = 64


class Digits:
    """The images, in an order of ``seed``.  A task of ``side_by_side/training.py``."""

    def __init__(self, images: Images, seed: int) -> None:
        train, held_out = split(images)
        self.train, self.held_out = train.cuda(), held_out.cuda()
        self._batches = batches(self.train, BATCH_SIZE, seed)

    def next_batch(self) -> Images:
        """:data:`BATCH_SIZE` images."""
        return next(self._batches)

    def loss(self, model: torch.nn.Module, images: Images) -> tuple[Tensor, Tensor]:
        """Mean cross entropy (nats), and how many images the largest logit has right, as a share."""
        logits = model(images.pixels)
        right = (logits.argmax(-1) == images.labels).float().mean()
        return torch.nn.functional.cross_entropy(logits, images.labels), right


def measure(args: Namespace, seed: int) -> dict[str, Any]:
    """One seed, of the weights and of the order of the images: what both models learned, and how fast."""
    images = load(args.images)
    task = Digits(images, seed)
    row = take_turns(args, seed, classifiers(args, seed, images.side), task)
    return row | {
        "patches": (images.side // args.patch) ** 2,
        "images_a_step": BATCH_SIZE,
        "train_images": len(task.train),
        "held_out_images": len(task.held_out),
    }
