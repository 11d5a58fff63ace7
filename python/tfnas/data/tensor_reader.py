"""Batches from images held as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tfnas.data.images import TensorImages
from tfnas.data.keyed_random import Purpose, uniforms
from tfnas.data.tensor_augment import TensorAugmentation, central_crop, resize


@dataclass(frozen=True)
class TensorReader:
    """Gathers, and augments when `augmentation` is given; otherwise brings images to `resolution`.

    `crop_evaluation`: stored images have a margin (see `resident`), so that they are cropped, not resized.
    """

    images: TensorImages
    resolution: int
    seed: int
    augmentation: TensorAugmentation | None = None
    crop_evaluation: bool = False

    def read(self, epoch: int, batches: Sequence[NDArray[np.int64]]) -> Iterator[torch.Tensor]:
        """uint8 or float32 (0..255) `[n, C, resolution, resolution]` for each array of indices."""
        for indices in batches:
            stored = self.images.gather(indices)
            if self.augmentation is not None:
                random = uniforms(self.seed, Purpose.AUGMENTATION, epoch, indices, self.augmentation.numbers)
                yield self.augmentation.apply(stored, random)
            elif self.crop_evaluation:
                yield central_crop(stored, self.resolution)
            else:
                yield resize(stored, self.resolution)
