"""What a user can say about the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tfnas.data.errors import DataError

Format = Literal["auto", "folder", "list", "idx", "npz"]
Crop = Literal["auto", "pad", "resized", "none"]
FILE_JITTER = (0.4, 0.4, 0.4, 0.2)
NO_JITTER = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class DataOptions:
    """Which images, which classes, how they are split, changed and delivered.

    Args:
        source: `quickstart` or `fashion-mnist-subset` (the shipped part of Fashion-MNIST), `fake` (random images whose
            classes can be learnt), `fashion-mnist` (the whole set from Debian's package), or a path: a folder with one
            folder of images per class (or with `train` and `val`/`test` folders of such), a list file, a folder of IDX
            files or one of them, an `.npz` file.
        format: how to read a path; `auto` decides by what is there.
        test_source: another path of the same kind with test images, where `source` does not bring its own.
        list_root: folder that relative paths of a list file start from; None: the list file's own folder.
        label_map: text file for a list file's labels, one `label class name` per line; the line number is the class.
        num_classes: number of classes `source` is known to have: labels outside are an error. `fake`: how many to make.
        classes: use these classes only (names), or this many chosen by the seed; None: all.
        held_out_fraction: part of every class kept from the weights for alpha and beta (paper: 0.2).
        resolution: height and width of the delivered images; None: as stored (image files: 224).
        image_channels: 1 or 3; None: as stored (image files: 3).
        batch_size: images a step (per process).
        evaluation_batch_size: images a step of the held-out and test images; None: `batch_size`.
        crop: training crop: `pad` (zero-pad by `padding` pixels, crop back), `resized` (random area and aspect),
            `none`; `auto`: `pad` for arrays, `resized` for image files.
        padding: pixels of `pad`.
        flip: mirror half of the training images left to right. Turn it off for digits and letters.
        color_jitter: brightness, contrast, saturation, hue; None: 0.4, 0.4, 0.4, 0.2 for image files, off for arrays.
        mean: per channel, of intensities in 0..1; None: measured on the training images (image files: ImageNet's).
        std: as `mean`.
        device: where batches are delivered. Arrays are kept there as uint8 and augmented there.
        resident: decode image files once, keep them on `device` as uint8 and augment them there as arrays.
        workers: processes that decode image files; 0: in this one. The images do not depend on it.
        skip_bad_images: read every image file first and leave out what cannot be decoded, instead of an error.
        fake_images_per_class: number of training images per class of `fake`.
    """

    source: str = "quickstart"
    format: Format = "auto"
    test_source: str | None = None
    list_root: str | None = None
    label_map: str | None = None
    num_classes: int | None = None
    classes: int | list[str] | None = None
    held_out_fraction: float = 0.2
    resolution: int | None = None
    image_channels: int | None = None
    batch_size: int = 32
    evaluation_batch_size: int | None = None
    crop: Crop = "auto"
    padding: int = 2
    flip: bool = True
    color_jitter: tuple[float, float, float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    device: str = "cpu"
    resident: bool = False
    workers: int = 0
    skip_bad_images: bool = False
    fake_images_per_class: int = 20

    def __post_init__(self) -> None:
        """Raises `DataError` naming the option out of range."""
        if not self.source:
            raise DataError("source: expected a name (quickstart, fake, fashion-mnist) or a path, got an empty string")
        if not 0.0 < self.held_out_fraction < 1.0:
            raise DataError(f"held_out_fraction: expected a number between 0 and 1, got {self.held_out_fraction}")
        self._at_least("batch_size", 1)
        self._at_least("evaluation_batch_size", 1)
        self._at_least("resolution", 1)
        self._at_least("num_classes", 1)
        if not 0 <= self.padding <= 4096:
            raise DataError(f"padding: expected 0 to 4096 pixels, got {self.padding}")
        self._at_least("workers", 0)
        self._at_least("fake_images_per_class", 2)
        if self.image_channels not in (None, 1, 3):
            raise DataError(f"image_channels: expected 1 or 3, got {self.image_channels}")
        if self.format not in ("auto", "folder", "list", "idx", "npz"):
            raise DataError(f"format: expected auto, folder, list, idx or npz, got {self.format!r}")
        if self.crop not in ("auto", "pad", "resized", "none"):
            raise DataError(f"crop: expected auto, pad, resized or none, got {self.crop!r}")
        if (isinstance(self.classes, int) and self.classes < 1) or self.classes == []:
            raise DataError(f"classes: expected names or a number of at least 1, got {self.classes}")
        jitter = self.color_jitter
        if jitter is not None and (len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5):
            raise DataError(
                f"color_jitter: expected brightness, contrast, saturation (at least 0) and hue (0 to 0.5), got {jitter}"
            )
        if self.std is not None and min(self.std, default=0.0) <= 0:
            raise DataError(f"std: expected numbers above 0, one per channel, got {self.std}")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise DataError(f"{name}: expected at least {least}, got {value}")
