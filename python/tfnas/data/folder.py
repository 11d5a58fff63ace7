"""Image folders: one folder per class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tfnas.data.errors import DataError
from tfnas.data.images import FileImages, Labelled
from tfnas.files import shown

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"))
_TRAIN = ("train",)
_TEST = ("val", "test", "validation")


def split_folders(source: Path) -> tuple[Path, Path | None]:
    """(training folder, test folder or None): `source/train` with `source/val` or `source/test`, else `source`."""
    train = next((source / name for name in _TRAIN if (source / name).is_dir()), None)
    if train is None:
        return source, None
    return train, next((source / name for name in _TEST if (source / name).is_dir()), None)


def scan_folder(root: Path, class_folders: tuple[str, ...] | None = None) -> tuple[Labelled, tuple[str, ...]]:
    """All images of `root`, one class per folder, and the folder names; classes and files in the order of their names.

    `class_folders` are the training classes that a test folder must have too.

    Raises:
        DataError: no class folders, a class folder that is missing or holds no image, an empty image file.
    """
    try:
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{shown(root)}: cannot be read: {error.strerror or error}") from error
    if not found:
        raise DataError(f"{shown(root)}: expected one folder of images per class, got no folders")
    if class_folders is not None:
        _require_same(root, class_folders, found)
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(found):
        images = sorted(_images_below(os.path.join(root, name), set()))
        if not images:
            raise DataError(
                f"{shown(root / name)}: expected images of class {shown(name)} ({' '.join(sorted(EXTENSIONS))}), "
                "got none; add images or remove the folder"
            )
        paths += images
        labels += [label] * len(images)
    names = tuple(shown(name) for name in found)
    return Labelled(FileImages.of(paths), np.array(labels, dtype=np.int64), names), tuple(found)


def _require_same(root: Path, expected: tuple[str, ...], found: list[str]) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise DataError(f"{shown(root)}: expected a folder for every training class, got none for {_some(missing)}")
    if unknown:
        raise DataError(f"{shown(root)}: expected the training classes only, got also {_some(unknown)}")


def _some(names: list[str]) -> str:
    return ", ".join(shown(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _images_below(folder: str, visited: set[tuple[int, int]]) -> list[str]:
    identity = os.stat(folder)
    # A link to a folder above would be followed for ever.
    if (identity.st_dev, identity.st_ino) in visited:
        return []
    visited.add((identity.st_dev, identity.st_ino))
    found: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                found += _images_below(entry.path, visited)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and not entry.name.startswith("."):
                found.append(entry.path)
    return found
