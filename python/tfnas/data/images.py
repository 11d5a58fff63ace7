"""Images as the readers see them: kept as one uint8 tensor, synthesised, or files to decode."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

ImageShape = tuple[int, int, int]


class TensorImages(Protocol):
    """Images of one size that can be had as a tensor."""

    shape: ImageShape

    def gather(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """uint8 `[len(indices), C, H, W]`."""
        ...

    def subset(self, indices: NDArray[np.int64]) -> TensorImages:
        """These images alone, numbered from 0."""
        ...


class ArrayImages:
    """Images in memory: uint8 `[N, C, H, W]`, on whatever device `pixels` is."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels
        self.shape: ImageShape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])

    def gather(self, indices: NDArray[np.int64]) -> torch.Tensor:
        return self.pixels[torch.from_numpy(indices).to(self.pixels.device, non_blocking=True)]

    def subset(self, indices: NDArray[np.int64]) -> ArrayImages:
        return ArrayImages(self.gather(indices))

    def to(self, device: torch.device) -> ArrayImages:
        return ArrayImages(self.pixels.to(device))


class FileImages:
    """Paths of image files. Kept as one array of bytes: workers share it without copying on every reference."""

    def __init__(self, paths: NDArray[np.bytes_]) -> None:
        self._paths = paths

    @classmethod
    def of(cls, paths: list[str]) -> FileImages:
        return cls(np.array([os.fsencode(path) for path in paths], dtype=np.bytes_))

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        return os.fsdecode(bytes(self._paths[index]))

    def subset(self, indices: NDArray[np.int64]) -> FileImages:
        """These files alone, numbered from 0."""
        return FileImages(self._paths[indices])


@dataclass(frozen=True)
class Labelled:
    """Images with their classes: `labels` int64 `[N]`, each in `0..len(class_names) - 1`."""

    images: TensorImages | FileImages
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def subset(self, indices: NDArray[np.int64]) -> Labelled:
        """These images alone, with all classes."""
        return Labelled(self.images.subset(indices), self.labels[indices], self.class_names)
