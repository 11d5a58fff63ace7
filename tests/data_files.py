"""Small data sets on disk for the tests of the data layer."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "red fox")


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """An image of its own: a coloured ramp."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([(x * 9 + number * 31) % 256, (y * 11 + number * 17) % 256, (x * y + number * 7) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def image_folder(root: Path, per_class: int = 10, classes: tuple[str, ...] = CLASSES) -> Path:
    """`root/<class>/<number>.png`, sizes varying."""
    number = 0
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            picture(number, (14 + number % 7, 12 + number % 5)).save(root / name / f"image {i:02d}.png")
            number += 1
    return root


def idx_bytes(array: np.ndarray, code: int = 8) -> bytes:
    """An IDX file; `array` must be big-endian."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def arrays(count: int = 40, classes: int = 4, shape: tuple[int, ...] = (8, 8)) -> tuple[np.ndarray, np.ndarray]:
    """Random uint8 images `[count, *shape]` and labels, classes alternating."""
    images = np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, (np.arange(count) % classes).astype(np.uint8)


def idx_folder(root: Path, *, zipped: bool = False, test: bool = True) -> Path:
    """The four files of an MNIST-like set (two without a test set)."""
    root.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 40), ("t10k", 12)) if test else (("train", 40),):
        images, labels = arrays(count)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            body = idx_bytes(array)
            suffix = ".gz" if zipped else ""
            (root / f"{name}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(body) if zipped else body)
    return root
