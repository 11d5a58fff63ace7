"""Random images whose classes can be learnt: for trying a configuration, tests and benchmarks without any data."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tfnas.data.images import ImageShape, Labelled
from tfnas.data.keyed_random import Purpose, uniforms

_GRID = 4
# Share of an image that its class decides; the rest is noise of its own.
_CLASS_SHARE = 0.6
FAKE_MEAN, FAKE_STD = 0.5, 0.2


class FakeImages:
    """Smooth blobs of colour: a 4x4 grid per class mixed with one per image, enlarged. Synthesised when asked for."""

    def __init__(
        self, labels: NDArray[np.int64], numbers: NDArray[np.int64], shape: ImageShape, seed: int, device: torch.device
    ) -> None:
        """`numbers` tell images apart: the same number and label give the same image."""
        self.shape = shape
        self._labels, self._numbers, self._seed, self._device = labels, numbers, seed, device

    def subset(self, indices: NDArray[np.int64]) -> FakeImages:
        return FakeImages(self._labels[indices], self._numbers[indices], self.shape, self._seed, self._device)

    def gather(self, indices: NDArray[np.int64]) -> torch.Tensor:
        channels, height, width = self.shape
        count = channels * _GRID * _GRID
        of_class = uniforms(self._seed, Purpose.FAKE_CLASS, 0, self._labels[indices], count)
        of_image = uniforms(self._seed, Purpose.FAKE_IMAGE, 0, self._numbers[indices], count)
        grid = torch.from_numpy(_CLASS_SHARE * of_class + (1 - _CLASS_SHARE) * of_image)
        grid = grid.to(self._device, non_blocking=True).view(len(indices), channels, _GRID, _GRID)
        enlarged = functional.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)
        return enlarged.mul_(256).to(torch.uint8)


def fake_images(
    *, num_classes: int, per_class: int, shape: ImageShape, seed: int, first: int, device: torch.device
) -> Labelled:
    """`per_class` images of every class, classes alternating; `first` numbers the images, so that two sets differ."""
    labels = np.arange(num_classes * per_class, dtype=np.int64) % num_classes
    names = tuple(f"fake_{i}" for i in range(num_classes))
    return Labelled(FakeImages(labels, first + np.arange(len(labels)), shape, seed, device), labels, names)
