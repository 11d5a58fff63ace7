"""From the name or path of a source to its images, training and test."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from tfnas.data.arrays import labelled_arrays
from tfnas.data.errors import DataError
from tfnas.data.fake import fake_images
from tfnas.data.folder import scan_folder, split_folders
from tfnas.data.idx import find_idx_pairs, labels_beside, read_idx
from tfnas.data.images import Labelled
from tfnas.data.list_file import read_label_map, read_list
from tfnas.data.npz import read_npz
from tfnas.data.options import DataOptions
from tfnas.files import shown

QUICKSTART_NAMES = ("quickstart", "fashion-mnist-subset")
QUICKSTART_FOLDER = Path(__file__).with_name("fashion_mnist_subset")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FAKE_RESOLUTION, _FAKE_CHANNELS, _FAKE_CLASSES = 32, 3, 10


@dataclass(frozen=True)
class Source:
    """Training images, and test images where the source has them. `test` has the same classes."""

    train: Labelled
    test: Labelled | None


def open_source(options: DataOptions, seed: int) -> Source:
    """Find and read (arrays) or list (files) what `options.source` names.

    Raises:
        DataError: nothing of that name, or not of a known or of the named format, or inconsistent in itself.
    """
    if options.source == "fake":
        return _fake(options, seed)
    if options.source in QUICKSTART_NAMES:
        return _idx(options, QUICKSTART_FOLDER, FASHION_MNIST_CLASSES)
    if options.source == "fashion-mnist":
        if not FASHION_MNIST_FOLDER.is_dir():
            raise DataError(
                f"source: fashion-mnist is read from {FASHION_MNIST_FOLDER}, which does not exist; install Debian's "
                "package dataset-fashion-mnist, or give the folder that holds the IDX files"
            )
        return _idx(options, FASHION_MNIST_FOLDER, FASHION_MNIST_CLASSES)
    path = Path(options.source)
    if not path.exists():
        raise DataError(
            f"source: expected quickstart, fake, fashion-mnist or an existing path, got {shown(options.source)}"
        )
    if path.is_char_device() or path.is_block_device():
        raise DataError(f"source: expected a folder or a file, got the device {shown(path)}")  # may never end
    readers = {"folder": _folder, "list": _list, "npz": _npz}
    chosen = options.format if options.format != "auto" else _format_of(path)
    if chosen == "idx":
        return _idx(options, path, None)
    return readers[chosen](options, path)


def _format_of(path: Path) -> str:
    if path.is_dir():
        return "idx" if any("idx" in entry.name and "ubyte" in entry.name for entry in os.scandir(path)) else "folder"
    if path.suffix == ".npz":
        return "npz"
    return "idx" if path.name.removesuffix(".gz").endswith("ubyte") else "list"


def _fake(options: DataOptions, seed: int) -> Source:
    classes = options.num_classes or _FAKE_CLASSES
    side = options.resolution or _FAKE_RESOLUTION
    shape = (options.image_channels or _FAKE_CHANNELS, side, side)
    device = torch.device(options.device)
    per_class = options.fake_images_per_class
    train = fake_images(num_classes=classes, per_class=per_class, shape=shape, seed=seed, first=0, device=device)
    test = fake_images(
        num_classes=classes,
        per_class=max(per_class // 4, 1),
        shape=shape,
        seed=seed,
        first=len(train.labels),
        device=device,
    )
    return Source(train, test)


def _idx(options: DataOptions, path: Path, class_names: tuple[str, ...] | None) -> Source:
    pair, test_pair = find_idx_pairs(path)
    if options.test_source is not None:
        images = Path(options.test_source)
        test_pair = (images, labels_beside(images))
    train = _read_idx_pair(options, pair, _names(options, class_names))
    return Source(train, _read_idx_pair(options, test_pair, train.class_names) if test_pair else None)


def _read_idx_pair(options: DataOptions, pair: tuple[Path, Path], class_names: tuple[str, ...] | None) -> Labelled:
    images, labels = (read_idx(path) for path in pair)
    where = (shown(pair[0]), shown(pair[1]))
    return labelled_arrays(images, labels, where=where, channels=options.image_channels, class_names=class_names)


def _npz(options: DataOptions, path: Path) -> Source:
    train_pair, test_pair, archive_names = read_npz(path)
    test_path = path
    if options.test_source is not None:
        test_path = Path(options.test_source)
        own, test_pair, _ = read_npz(test_path)
        test_pair = test_pair or own
    where = (f"{shown(path)}: images", f"{shown(path)}: labels")
    names = _names(options, archive_names)
    train = labelled_arrays(*train_pair, where=where, channels=options.image_channels, class_names=names)
    if test_pair is None:
        return Source(train, None)
    where = (f"{shown(test_path)}: test images", f"{shown(test_path)}: test labels")
    test = labelled_arrays(*test_pair, where=where, channels=options.image_channels, class_names=train.class_names)
    return Source(train, test)


def _names(options: DataOptions, class_names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if class_names is None:
        return None if options.num_classes is None else tuple(str(i) for i in range(options.num_classes))
    if options.num_classes not in (None, len(class_names)):
        raise DataError(f"num_classes: expected {len(class_names)} (the source's), got {options.num_classes}")
    return class_names


def _folder(options: DataOptions, path: Path) -> Source:
    if not path.is_dir():
        raise DataError(f"source: expected a folder of class folders, got the file {shown(path)}")
    train_folder, test_folder = split_folders(path)
    if options.test_source is not None:
        test_folder = Path(options.test_source)
    train, folders = scan_folder(train_folder)
    _names(options, train.class_names)
    return Source(train, scan_folder(test_folder, folders)[0] if test_folder else None)


def _list(options: DataOptions, path: Path) -> Source:
    root = None if options.list_root is None else Path(options.list_root)
    mapping = None if options.label_map is None else read_label_map(Path(options.label_map))
    train = read_list(path, root, mapping, options.num_classes)
    _names(options, train.class_names)
    if options.test_source is None:
        return Source(train, None)
    return Source(train, read_list(Path(options.test_source), root, mapping, len(train.class_names)))
