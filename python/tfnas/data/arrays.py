"""From arrays as they are stored to checked labels and a uint8 tensor [N, C, H, W]."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tfnas.data.errors import DataError
from tfnas.data.images import ArrayImages, Labelled

# Rec. 601 luma, the weights PIL's conversion to "L" uses.
LUMA = (0.299, 0.587, 0.114)


def to_pixels(images: NDArray[np.generic], where: str, channels: int | None) -> torch.Tensor:
    """uint8 `[N, C, H, W]` from `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`; converted to `channels`."""
    if images.dtype != np.uint8:
        raise DataError(f"{where}: expected uint8 intensities 0..255, got {images.dtype}; scale and convert them")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            f"{where}: expected [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, got {list(images.shape)}"
        )
    if 0 in images.shape:
        raise DataError(f"{where}: expected at least one image, got an array of {list(images.shape)}")
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    if channels == 3 and pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1).contiguous()
    elif channels == 1 and pixels.shape[1] == 3:
        pixels = _luma(pixels)
    return pixels


def _luma(pixels: torch.Tensor) -> torch.Tensor:
    # 16-bit fixed point, rounded: exact on every machine and without a float copy of the whole set.
    weights = [round(weight * 65536) for weight in LUMA]
    gray = torch.empty_like(pixels[:, :1])
    for start in range(0, len(pixels), 4096):
        red, green, blue = pixels[start : start + 4096].to(torch.int32).unbind(1)
        total = red * weights[0] + green * weights[1] + blue * weights[2] + 32768
        gray[start : start + 4096, 0] = (total >> 16).to(torch.uint8)
    return gray


def to_labels(labels: NDArray[np.generic], where: str, count: int) -> NDArray[np.int64]:
    """int64 `[count]`, checked to be as many whole numbers as there are images."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{where}: expected one whole number per image, got {labels.dtype} {list(labels.shape)}")
    if len(labels) != count:
        raise DataError(f"{where}: expected as many labels as images ({count}), got {len(labels)}")
    return labels.astype(np.int64)


def check_labels(labels: NDArray[np.int64], where: str, num_classes: int) -> None:
    """Raises `DataError` naming the first image whose label is outside `0..num_classes - 1`."""
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        first = outside[0]
        raise DataError(
            f"{where}: expected labels in 0..{num_classes - 1}, got {labels[first]} at image {first} "
            f"({len(outside)} such labels); correct the labels or num_classes"
        )


def labelled_arrays(
    images: NDArray[np.generic],
    labels: NDArray[np.generic],
    *,
    where: tuple[str, str],
    channels: int | None,
    class_names: tuple[str, ...] | None,
) -> Labelled:
    """Check a pair of arrays; `where` names the two for messages. Without names the classes are `0..largest label`."""
    pixels = to_pixels(images, where[0], channels)
    checked = to_labels(labels, where[1], len(pixels))
    # Without names, more classes than images cannot all have one: a stray label must not make a billion of them.
    check_labels(checked, where[1], len(checked) if class_names is None else len(class_names))
    if class_names is None:
        class_names = tuple(str(i) for i in range(int(checked.max()) + 1))
    return Labelled(ArrayImages(pixels), checked, class_names)
