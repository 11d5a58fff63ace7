"""Which reader, which augmentation and which size suit the images and the options."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tfnas.data.errors import DataError
from tfnas.data.file_reader import FileReader, FileTransform
from tfnas.data.images import FileImages, ImageShape, Labelled, TensorImages
from tfnas.data.loader import Reader
from tfnas.data.options import FILE_JITTER, NO_JITTER, DataOptions
from tfnas.data.resident import decode_all
from tfnas.data.tensor_augment import TensorAugmentation
from tfnas.data.tensor_reader import TensorReader

_FILE_RESOLUTION, _FILE_CHANNELS = 224, 3


@dataclass(frozen=True)
class Readers:
    """The two ways of reading one set of images. `image_shape`: (C, H, W) of what both deliver."""

    training: Reader
    evaluation: Reader
    image_shape: ImageShape


def make_readers(part: Labelled, options: DataOptions, seed: int, device: torch.device) -> Readers:
    """Raises `DataError` where the images cannot be delivered in one square size."""
    if not isinstance(part.images, FileImages):
        return _tensors(part.images, options, seed)
    return (_resident if options.resident else _files)(part.images, options, seed, device)


def _shorter_side(resolution: int) -> int:
    """Before the evaluation's central crop: 256 for 224, a seventh more for others.

    In steps of 4: a crop of a crop then rounds as one crop does, so that resident images equal those from files.
    """
    return resolution + 4 * round(resolution / 28)


def _tensors(images: TensorImages, options: DataOptions, seed: int) -> Readers:
    channels, height, width = images.shape
    if options.resolution is None and height != width:
        raise DataError(
            f"resolution: the images are {height}x{width}, expected square ones; give a resolution to resize them to"
        )
    resolution = options.resolution or height
    evaluation = TensorReader(images, resolution, seed)
    crop = "pad" if options.crop == "auto" else options.crop
    augmentation = TensorAugmentation(
        crop, options.padding, options.flip, options.color_jitter or NO_JITTER, resolution
    )
    return Readers(replace(evaluation, augmentation=augmentation), evaluation, (channels, resolution, resolution))


def _files(images: FileImages, options: DataOptions, seed: int, device: torch.device) -> Readers:
    training, evaluation = _file_transforms(options)
    reader = _file_reader(images, evaluation, options, seed, device)
    shape = (reader.channels, evaluation.resolution, evaluation.resolution)
    return Readers(replace(reader, transform=training), reader, shape)


def _file_reader(
    images: FileImages, transform: FileTransform, options: DataOptions, seed: int, device: torch.device
) -> FileReader:
    return FileReader(images, options.image_channels or _FILE_CHANNELS, transform, seed, options.workers, device)


def _file_transforms(options: DataOptions) -> tuple[FileTransform, FileTransform]:
    resolution = options.resolution or _FILE_RESOLUTION
    crop = "resized" if options.crop == "auto" else options.crop
    # Images that are stretched for training are stretched for evaluation, so that things keep their size.
    evaluation = FileTransform(resolution, _shorter_side(resolution), "pad" if crop == "pad" else "none")
    jitter = FILE_JITTER if options.color_jitter is None else options.color_jitter
    return replace(evaluation, crop=crop, padding=options.padding, flip=options.flip, color_jitter=jitter), evaluation


def _resident(images: FileImages, options: DataOptions, seed: int, device: torch.device) -> Readers:
    training, evaluation = _file_transforms(options)
    margin = training.crop == "resized"
    # Random crops are taken from the whole margin of 256, evaluation's from its middle.
    stored = replace(evaluation, resolution=evaluation.shorter_side) if margin else evaluation
    pixels = decode_all(_file_reader(images, stored, options, seed, device))
    augmentation = TensorAugmentation(
        training.crop, training.padding, training.flip, training.color_jitter, training.resolution
    )
    reader = TensorReader(pixels, training.resolution, seed, crop_evaluation=margin)
    shape = (pixels.shape[0], evaluation.resolution, evaluation.resolution)
    return Readers(replace(reader, augmentation=augmentation), reader, shape)
