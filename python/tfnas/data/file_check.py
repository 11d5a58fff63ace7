"""Looking at image files before the first epoch."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from tfnas.data.decode import decode
from tfnas.data.errors import DataError
from tfnas.data.images import FileImages
from tfnas.files import shown


def require_files(images: FileImages) -> None:
    """Raises `DataError` naming the first file that is missing, empty or none. Nothing is decoded."""
    for index in range(len(images)):
        _require_file(images.path(index))


def _require_file(path: str) -> None:
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{shown(path)}: expected an image file, got: {error.strerror or error}") from error
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would never end
        raise DataError(f"{shown(path)}: expected an image file, got a folder, pipe or device")
    if found.st_size == 0:
        raise DataError(
            f"{shown(path)}: expected an image file, got an empty one; replace it, or leave such files out with "
            "skip_bad_images"
        )


def readable_files(images: FileImages, channels: int, threads: int) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Decode every file: (indices of the good ones, a message for each of the others)."""

    def fault(index: int) -> str | None:
        try:
            _require_file(images.path(index))
            decode(images.path(index), channels)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        faults = list(pool.map(fault, range(len(images))))
    good = np.array([index for index, found in enumerate(faults) if found is None], dtype=np.int64)
    return good, tuple(found for found in faults if found is not None)
