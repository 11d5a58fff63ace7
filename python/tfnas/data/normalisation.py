"""Mean and standard deviation of intensities, and their use on a batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tfnas.data.fake import FAKE_MEAN, FAKE_STD
from tfnas.data.images import ArrayImages, FileImages, TensorImages

# Of ImageNet's training images, as used everywhere; the gray pair is their luma.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_GRAY_MEAN, IMAGENET_GRAY_STD = (0.459,), (0.225,)
_CHUNK = 4096

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def statistics_of(images: TensorImages | FileImages, samples: NDArray[np.int64], channels: int) -> Statistics:
    """(mean, std) per channel of intensities in 0..1: measured on `samples` for arrays, ImageNet's for image files."""
    if isinstance(images, ArrayImages):
        return measure(images, samples)
    if isinstance(images, FileImages):
        return (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (IMAGENET_GRAY_MEAN, IMAGENET_GRAY_STD)
    return (FAKE_MEAN,) * channels, (FAKE_STD,) * channels


def measure(images: ArrayImages, samples: NDArray[np.int64]) -> Statistics:
    """From a histogram of each channel, so that the sums are exact whatever the device and the number of threads."""
    channels = images.shape[0]
    counts = np.zeros((channels, 256), dtype=np.int64)
    for start in range(0, len(samples), _CHUNK):
        pixels = images.gather(samples[start : start + _CHUNK])
        for c in range(channels):
            counts[c] += torch.bincount(pixels[:, c].flatten(), minlength=256).cpu().numpy()
    levels = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    variance = (share * (levels[None] - mean[:, None]) ** 2).sum(axis=1)
    # Images of one colour have no spread; one level keeps the division finite.
    std = np.sqrt(np.maximum(variance, (1 / 255) ** 2))
    return tuple(mean.tolist()), tuple(std.tolist())


class Normalisation:
    """(intensity / 255 - mean) / std per channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.mean, self.std = mean, std
        spread = torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1)
        self._scale = (1 / (255 * spread)).float().to(device)
        self._shift = (torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1) / spread).float().to(device)

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 or float32 (0..255) `[N, C, H, W]` -> float32, channels last in memory."""
        floats = images.to(torch.float32, memory_format=torch.channels_last)
        return floats.mul(self._scale).sub_(self._shift).contiguous(memory_format=torch.channels_last)
