"""`build_data`: from options to loaders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tfnas.data.errors import DataError
from tfnas.data.file_check import readable_files, require_files
from tfnas.data.images import ArrayImages, FileImages, ImageShape, Labelled
from tfnas.data.loader import Loader
from tfnas.data.normalisation import Normalisation, statistics_of
from tfnas.data.options import DataOptions
from tfnas.data.readers import Readers, make_readers
from tfnas.data.sources import open_source
from tfnas.data.split import choose_classes, split_by_class


@dataclass(frozen=True)
class DataBundle:
    """Everything a search or a training reads.

    Args:
        train: shuffled and augmented; trains the weights.
        held_out: shuffled, not augmented; trains alpha and beta, measures the supernet.
        full_train: `train` and `held_out` together, augmented; trains a derived network.
        test: not augmented, in the source's order; None where the source has no test images.
        num_classes: classes in use.
        class_names: their names, in the order of the labels.
        image_shape: (C, H, W) of the delivered images.
        skipped: a message for every file left out by `skip_bad_images`.
    """

    train: Loader
    held_out: Loader
    full_train: Loader
    test: Loader | None
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: ImageShape
    skipped: tuple[str, ...]

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must find again: the numbers of training and held-out images, and the classes."""
        return {
            "images": [self.train.num_images, self.held_out.num_images],
            "classes": list(self.class_names),
        }


def build_data(options: DataOptions, seed: int, *, rank: int = 0, world_size: int = 1) -> DataBundle:
    """Read or list the images, choose classes, split them, and make the loaders.

    Args:
        options: see `DataOptions`.
        seed: decides classes (where a number is asked for), split, order, augmentation and fake images.
        rank, world_size: this process and their number, where several share each step.

    Raises:
        DataError: whatever makes the images unusable, before the first step: names the option or path, what was
            expected, what came, and the remedy. A file that is damaged inside shows when it is decoded, or here with
            `skip_bad_images` or `resident`.
    """
    device = _device(options.device)
    source = open_source(options, seed)
    classes = choose_classes(options.classes, source.train.class_names, seed)
    train_part, skipped = _usable(_of_classes(source.train, classes), options)
    train_samples, held_out_samples = split_by_class(
        train_part.labels, train_part.class_names, options.held_out_fraction, seed
    )
    test_part = None
    if source.test is not None:
        test_part, skipped_test = _usable(_of_classes(source.test, classes), options)
        skipped += skipped_test
        if not len(test_part.labels):
            raise DataError(
                "test images: expected at least one of the chosen classes, got none; leave the test set out"
            )

    readers = make_readers(train_part, options, seed, device)
    normalisation = _normalisation(train_part, train_samples, readers.image_shape[0], options)

    def loader(part: Labelled, made: Readers, samples: np.ndarray, *, shuffle: bool, training: bool) -> Loader:
        evaluation_batch = options.evaluation_batch_size or options.batch_size
        return Loader(
            made.training if training else made.evaluation,
            part.labels,
            samples,
            normalisation,
            batch_size=options.batch_size if training else evaluation_batch,
            seed=seed,
            shuffle=shuffle,
            training=training,
            device=device,
            rank=rank,
            world_size=world_size,
        )

    everything = np.arange(len(train_part.labels), dtype=np.int64)
    test = None
    if test_part is not None:
        test_samples = np.arange(len(test_part.labels), dtype=np.int64)
        test_readers = make_readers(test_part, options, seed, device)
        if test_readers.image_shape != readers.image_shape:
            raise DataError(
                f"test images: expected {_size(readers.image_shape)} like the training images, "
                f"got {_size(test_readers.image_shape)}; give resolution and image_channels to bring both to one size"
            )
        test = loader(test_part, test_readers, test_samples, shuffle=False, training=False)
    train = loader(train_part, readers, train_samples, shuffle=True, training=True)
    if not len(train):
        raise DataError(
            f"source: expected at least {2 * world_size} training images for a step of {world_size} process(es), "
            f"got {train.num_images}"
        )
    return DataBundle(
        train=train,
        held_out=loader(train_part, readers, held_out_samples, shuffle=True, training=False),
        full_train=loader(train_part, readers, everything, shuffle=True, training=True),
        test=test,
        num_classes=len(train_part.class_names),
        class_names=train_part.class_names,
        image_shape=readers.image_shape,
        skipped=skipped,
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DataError(f"device: expected cpu or cuda (or cuda:0, ...), got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"device: {name} asked for, but this torch ({torch.__version__}) sees no GPU; use cpu")
    if device.type not in ("cpu", "cuda"):
        raise DataError(f"device: expected cpu or cuda, got {name!r}")
    return device


def _size(shape: ImageShape) -> str:
    return "x".join(map(str, shape))


def _of_classes(part: Labelled, classes: np.ndarray) -> Labelled:
    """The images of `classes` alone, relabelled 0, 1, ... in their order."""
    names = tuple(part.class_names[label] for label in classes)
    if len(classes) == len(part.class_names):
        return part
    renumbered = np.full(len(part.class_names), -1, dtype=np.int64)
    renumbered[classes] = np.arange(len(classes))
    samples = np.flatnonzero(renumbered[part.labels] >= 0)
    return Labelled(part.images.subset(samples), renumbered[part.labels[samples]], names)


def _usable(part: Labelled, options: DataOptions) -> tuple[Labelled, tuple[str, ...]]:
    if isinstance(part.images, ArrayImages):
        return replace(part, images=part.images.to(torch.device(options.device))), ()
    if not isinstance(part.images, FileImages):
        return part, ()
    if not options.skip_bad_images:
        require_files(part.images)
        return part, ()
    good, skipped = readable_files(part.images, options.image_channels or 3, options.workers)
    return part.subset(good), skipped


def _normalisation(part: Labelled, samples: np.ndarray, channels: int, options: DataOptions) -> Normalisation:
    mean, std = options.mean, options.std
    if mean is None or std is None:
        measured = statistics_of(part.images, samples, channels)
        mean, std = mean or measured[0], std or measured[1]
    for name, value in (("mean", mean), ("std", std)):
        if len(value) != channels:
            raise DataError(f"{name}: expected {channels} numbers, one per channel, got {len(value)}")
    return Normalisation(mean, std, torch.device(options.device))
