"""NumPy archives of images and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tfnas.data.errors import DataError
from tfnas.files import shown

_NAMES = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train"), ("images", "labels")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}
Pair = tuple[NDArray[np.generic], NDArray[np.generic]]


def read_npz(path: Path) -> tuple[Pair, Pair | None, tuple[str, ...] | None]:
    """(training images and labels, test images and labels or None, class names or None).

    The arrays are called `train_images`, `train_labels`, `test_images`, `test_labels` (or `x_train`, `y_train`,
    `x_test`, `y_test`, or `images`, `labels`), optionally `class_names`. Pickled objects are never loaded.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{shown(path)}: expected an .npz archive, got a single array")
        with archive:
            return _contents(archive, path)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile and numpy raise a dozen kinds on damaged archives
        raise DataError(f"{shown(path)}: expected a whole .npz archive of plain arrays, got: {error}") from error


def _contents(archive: np.lib.npyio.NpzFile, path: Path) -> tuple[Pair, Pair | None, tuple[str, ...] | None]:
    train = _pair(archive, path, "train")
    if train is None:
        expected = " or ".join(" + ".join(pair) for pair in _NAMES["train"])
        raise DataError(f"{shown(path)}: expected arrays {expected}, got {', '.join(archive.files) or 'none'}")
    names = _member(archive, path, "class_names") if "class_names" in archive.files else None
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise DataError(
            f"{shown(path)}: class_names: expected a list of strings, got {names.dtype} {list(names.shape)}"
        )
    return train, _pair(archive, path, "test"), None if names is None else tuple(str(name) for name in names)


def _pair(archive: np.lib.npyio.NpzFile, path: Path, part: str) -> Pair | None:
    for images, labels in _NAMES[part]:
        if images in archive.files:
            if labels not in archive.files:
                raise DataError(f"{shown(path)}: expected {labels} beside {images}, got {', '.join(archive.files)}")
            return _member(archive, path, images), _member(archive, path, labels)
    return None


def _member(archive: np.lib.npyio.NpzFile, path: Path, name: str) -> NDArray[np.generic]:
    try:
        return archive[name]
    except ValueError as error:
        raise DataError(
            f"{shown(path)}: {name}: expected a plain array of numbers or strings (pickled objects are never loaded), "
            f"got: {error}"
        ) from error
