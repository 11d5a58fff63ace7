"""Augmentation of a batch as tensor operations, on the CPU or on a GPU, from random numbers drawn per sample.

Every image of a batch has crop, mirroring and colours of its own, and none of them depends on the rest of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tfnas.data.arrays import LUMA
from tfnas.data.options import Crop

# As torchvision's RandomResizedCrop: area, aspect ratio, and tries before a central crop.
AREA = (0.08, 1.0)
ASPECT = (3.0 / 4.0, 4.0 / 3.0)
_TRIES = 10


@dataclass(frozen=True)
class TensorAugmentation:
    """What happens to training images.

    `color_jitter`: brightness, contrast, saturation (factors 1 +- x) and hue (turns, +- x), changed in that order
    (torchvision shuffles the four). `resized` interpolates without smoothing: stored images should be at most about
    twice as large as `resolution`.
    """

    crop: Crop
    padding: int
    flip: bool
    color_jitter: tuple[float, float, float, float]
    resolution: int

    @property
    def numbers(self) -> int:
        """Random numbers used per image."""
        return 2 * _TRIES + 2 + 1 + 4

    def apply(self, images: torch.Tensor, random: NDArray[np.float32]) -> torch.Tensor:
        """uint8 `[N, C, H, W]`, `random` in [0, 1) `[N, numbers]` -> uint8 or float32 (0..255) `[N, C, R, R]`."""
        flip = (random[:, 22] < 0.5) & self.flip
        if self.crop == "resized":
            boxes = resized_boxes(random[:, :22], images.shape[2], images.shape[3])
            out = crop_and_resize(images, boxes, flip, self.resolution)
        else:
            padding = self.padding if self.crop == "pad" else 0
            out = resize(pad_and_crop(images, random[:, 20:22], flip, padding), self.resolution)
        if any(self.color_jitter):
            out = jitter_colors(out, self._factors(random[:, 23:27]))
        return out

    def _factors(self, random: NDArray[np.float32]) -> NDArray[np.float32]:
        strength = np.array(self.color_jitter, dtype=np.float32)
        low = np.maximum(np.array([1, 1, 1, 0], dtype=np.float32) - strength, np.array([0, 0, 0, -1], dtype=np.float32))
        high = np.array([1, 1, 1, 0], dtype=np.float32) + strength
        return low + random * (high - low)


def resized_boxes(random: NDArray[np.float32], height: int, width: int) -> NDArray[np.int64]:
    """Crops of random area and aspect inside `height x width`: int64 `[N, 4]` (top, left, height, width).

    `random`: `[N, 22]`. The first of ten tries that fits is taken, else the largest central crop of an allowed aspect.
    """
    count = len(random)
    area = height * width * (AREA[0] + random[:, :_TRIES].astype(np.float64) * (AREA[1] - AREA[0]))
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = np.exp(low + random[:, _TRIES : 2 * _TRIES].astype(np.float64) * (high - low))
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = (np.arange(count), fits.argmax(1))
    w, h = widths[first], heights[first]
    top = (random[:, 20] * (height - h + 1)).astype(np.int64)
    left = (random[:, 21] * (width - w + 1)).astype(np.int64)
    boxes = np.stack((top, left, h, w), axis=1)
    boxes[~fits.any(1)] = _central_box(height, width)
    return boxes


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    h = min(height, round(width / ASPECT[0]))
    w = min(width, round(height * ASPECT[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_and_resize(images: torch.Tensor, boxes: NDArray[np.int64], flip: NDArray[np.bool_], size: int) -> torch.Tensor:
    """Each image's box, mirrored where `flip`, at `size x size` (bilinear): float32 `[N, C, size, size]`.

    Equals cropping first and enlarging then: positions are clamped to the box, so that nothing outside it is mixed in.
    """
    _, _, height, width = images.shape
    table = torch.from_numpy(np.column_stack((boxes, flip)).astype(np.float32)).to(images.device, non_blocking=True)
    top, left, box_height, box_width, mirrored = table.unsqueeze(2).unbind(1)
    centre = (torch.arange(size, device=images.device, dtype=torch.float32) + 0.5) / size
    across = torch.where(mirrored > 0, 1 - centre, centre)
    x = left + (across * box_width - 0.5).clamp(min=0).minimum(box_width - 1)
    y = top + (centre * box_height - 0.5).clamp(min=0).minimum(box_height - 1)
    grid = torch.empty(len(images), size, size, 2, device=images.device)
    grid[..., 0] = ((2 * x + 1) / width - 1)[:, None, :]
    grid[..., 1] = ((2 * y + 1) / height - 1)[:, :, None]
    return functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


def pad_and_crop(
    images: torch.Tensor, random: NDArray[np.float32], flip: NDArray[np.bool_], padding: int
) -> torch.Tensor:
    """Shift by up to `padding` pixels (zeros come in), mirror where `flip`: same dtype and shape, channels last."""
    _, _, height, width = images.shape
    offset = np.minimum((random * (2 * padding + 1)).astype(np.int64), 2 * padding)
    rows = offset[:, :1] + np.arange(height)
    columns = offset[:, 1:] + np.where(flip[:, None], np.arange(width)[::-1], np.arange(width))
    index = torch.from_numpy(np.concatenate((rows, columns), axis=1)).to(images.device, non_blocking=True)
    padded = functional.pad(images, (padding,) * 4)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    # Indexing with a slice between puts the indexed axes first: [N, H, W, C].
    return padded[sample, :, index[:, :height, None], index[:, None, height:]].permute(0, 3, 1, 2)


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear, smoothed where it shrinks: float32 `[N, C, size, size]`; `images` themselves if of that size."""
    if images.shape[2] == images.shape[3] == size:
        return images
    return functional.interpolate(
        images.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )


def central_crop(images: torch.Tensor, size: int) -> torch.Tensor:
    """The middle `size x size` pixels."""
    top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
    return images[:, :, top : top + size, left : left + size]


def jitter_colors(images: torch.Tensor, factors: NDArray[np.float32]) -> torch.Tensor:
    """Brightness, contrast, saturation and hue of each image: float32 0..255 of the same shape.

    `factors` `[N, 4]`: three factors (1: unchanged) and a hue shift in turns. Gray images have no saturation or hue.
    """
    brightness, contrast, saturation, hue = (
        torch.from_numpy(factors).to(images.device, non_blocking=True).view(-1, 4, 1, 1, 1).unbind(1)
    )
    out = images.float().mul(brightness / 255).clamp_(0, 1)
    # In double precision the order of the sum, which depends on batch size and threads, does not reach the result.
    mean = _gray(out).mean((1, 2, 3), keepdim=True, dtype=torch.float64).float()
    out = torch.lerp(mean, out, contrast).clamp_(0, 1)
    if out.shape[1] == 3:
        out = torch.lerp(_gray(out), out, saturation).clamp_(0, 1)
        out = _shift_hue(out, hue[:, 0])
    return out.mul_(255)


def _gray(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def _shift_hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn the hue of RGB images in 0..1 on the HSV hexagon; lightness and saturation stay."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sector = torch.where(chroma > 0, sector, 0) + 6 * turns

    def channel(shift: int) -> torch.Tensor:
        distance = (sector + shift) % 6
        return value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1)

    return torch.stack((channel(5), channel(3), channel(1)), dim=1)
