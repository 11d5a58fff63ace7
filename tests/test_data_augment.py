"""Augmentation as tensor operations, against torchvision where it imports and against plain indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tfnas.data.options import FILE_JITTER, NO_JITTER
from tfnas.data.tensor_augment import (
    TensorAugmentation,
    central_crop,
    crop_and_resize,
    jitter_colors,
    pad_and_crop,
    resize,
    resized_boxes,
)

RANDOM = np.random.default_rng(11)


def images(count: int, channels: int = 3, height: int = 12, width: int = 12) -> torch.Tensor:
    return torch.from_numpy(RANDOM.integers(0, 256, (count, channels, height, width), dtype=np.uint8))


def drawn(count: int, numbers: int) -> np.ndarray:
    return RANDOM.random((count, numbers), dtype=np.float32)


def test_shift_and_mirror_equal_padding_slicing_and_flipping() -> None:
    batch, padding = images(40, height=9, width=7), 2
    random, flip = drawn(40, 2), RANDOM.random(40) < 0.5
    out = pad_and_crop(batch, random, flip, padding)
    assert out.dtype == torch.uint8
    offsets = set()
    for i in range(40):
        top, left = (int(r * (2 * padding + 1)) for r in random[i])
        offsets.add((top, left))
        expected = torch.nn.functional.pad(batch[i], (padding,) * 4)[:, top : top + 9, left : left + 7]
        assert torch.equal(out[i], expected.flip(-1) if flip[i] else expected)
    assert len(offsets) > 10


def test_all_shifts_are_equally_likely() -> None:
    count = 5000
    ramp = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(count, -1, -1, -1)
    out = pad_and_crop(ramp, drawn(count, 2), np.zeros(count, dtype=bool), 1)
    # The middle pixel tells the shift: 9 of them.
    counts = np.bincount(out[:, 0, 2, 2].numpy(), minlength=26)
    counts = counts[counts > 0]
    assert len(counts) == 9
    assert ((counts - count / 9) ** 2 / (count / 9)).sum() < 35  # 8 degrees of freedom: p below 1e-4


def test_boxes_lie_inside_and_have_the_areas_and_aspects_asked_for() -> None:
    boxes = resized_boxes(drawn(4000, 22), 64, 48)
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 64).all()
    assert (left + width <= 48).all()
    area, aspect = height * width / (64 * 48), width / height
    assert area.min() > 0.06
    assert aspect.min() > 0.68
    assert aspect.max() < 1.42
    assert area.max() > 0.85
    assert abs((top / np.maximum(64 - height, 1)).mean() - 0.5) < 0.03


def test_boxes_have_torchvisions_distribution() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(8)
    blank = torch.empty(1, 40, 40)
    theirs = [transform.make_params([blank]) for _ in range(3000)]
    areas = np.sort([p["height"] * p["width"] for p in theirs])
    boxes = resized_boxes(drawn(3000, 22), 40, 40)
    ours = np.sort(boxes[:, 2] * boxes[:, 3])
    # Two-sample Kolmogorov-Smirnov: 2.23 * sqrt(2 / n) is p = 1e-4.
    grid = np.unique(np.concatenate((areas, ours)))
    distance = abs(np.searchsorted(areas, grid, "right") - np.searchsorted(ours, grid, "right")).max() / 3000
    assert distance < 2.23 * (2 / 3000) ** 0.5


def test_a_shape_no_try_fits_gets_the_central_box() -> None:
    boxes = resized_boxes(np.full((3, 22), 0.999, dtype=np.float32), 100, 4)
    assert boxes.tolist() == [[47, 0, 5, 4]] * 3


def test_crop_and_resize_equals_torchvision_where_it_enlarges() -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    batch = images(30, height=20, width=16)
    boxes = resized_boxes(drawn(30, 22), 20, 16)
    flip = RANDOM.random(30) < 0.5
    out = crop_and_resize(batch, boxes, flip, 24)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        expected = functional.resized_crop(batch[i].float(), top, left, height, width, [24, 24], antialias=False)
        expected = expected.flip(-1) if flip[i] else expected
        assert (out[i] - expected).abs().max() < 0.01  # of 255


def test_the_whole_image_as_box_is_the_image() -> None:
    batch = images(3)
    boxes = np.array([[0, 0, 12, 12]] * 3)
    assert (crop_and_resize(batch, boxes, np.zeros(3, dtype=bool), 12) - batch).abs().max() < 1e-3


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue"])
def test_each_colour_change_equals_torchvisions(operation: str) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    batch = images(20)
    batch[0] = 130  # no colour at all
    neutral = np.tile(np.array([1, 1, 1, 0], dtype=np.float32), (20, 1))
    column = ["brightness", "contrast", "saturation", "hue"].index(operation)
    factors = neutral.copy()
    factors[:, column] += RANDOM.uniform(-0.5, 0.5, 20)
    out = jitter_colors(batch, factors)
    for i in range(20):
        expected = getattr(functional, f"adjust_{operation}")(batch[i].float() / 255, float(factors[i, column]))
        # torchvision rounds its luma weights to four digits.
        assert (out[i] / 255 - expected).abs().max() < 1e-3, f"image {i}"
    assert (jitter_colors(batch, neutral) - batch).abs().max() < 1e-3


def test_gray_images_change_in_brightness_and_contrast_only() -> None:
    batch = images(4, channels=1)
    with_colour = jitter_colors(batch, np.array([[1.2, 0.7, 0.5, 0.3]] * 4, dtype=np.float32))
    without = jitter_colors(batch, np.array([[1.2, 0.7, 1.0, 0.0]] * 4, dtype=np.float32))
    assert with_colour.shape == batch.shape
    assert torch.equal(with_colour, without)


@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("jitter", [NO_JITTER, FILE_JITTER])
def test_no_image_depends_on_the_rest_of_its_batch(
    crop: str, channels: int, jitter: tuple[float, float, float, float]
) -> None:
    augmentation = TensorAugmentation(crop, 2, True, jitter, 10)  # type: ignore[arg-type]
    batch, random = images(9, channels), drawn(9, augmentation.numbers)
    together = augmentation.apply(batch, random)
    alone = torch.cat([augmentation.apply(batch[i : i + 1], random[i : i + 1]) for i in range(9)])
    assert together.shape == (9, channels, 10, 10)
    assert torch.equal(together, alone)


def test_no_flip_no_crop_no_jitter_is_the_image() -> None:
    batch = images(5)
    augmentation = TensorAugmentation("none", 2, False, NO_JITTER, 12)
    assert torch.equal(augmentation.apply(batch, drawn(5, augmentation.numbers)), batch)


def test_half_of_the_images_are_mirrored() -> None:
    batch = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(2000, 1, 2, 2)
    augmentation = TensorAugmentation("none", 0, True, NO_JITTER, 2)
    out = augmentation.apply(batch, drawn(2000, augmentation.numbers))
    assert abs((out[:, 0, 0, 0] > 0).float().mean() - 0.5) < 0.045  # four standard errors


def test_resizing_smooths_and_central_crop_takes_the_middle() -> None:
    checkerboard = (torch.arange(64).view(1, 1, 1, 64) + torch.arange(64).view(1, 1, 64, 1)) % 2 * 255
    small = resize(checkerboard.to(torch.uint8), 16)
    assert (small[..., 2:-2, 2:-2] - 127.5).abs().max() < 8
    ramp = torch.arange(100, dtype=torch.uint8).view(1, 1, 10, 10)
    assert torch.equal(central_crop(ramp, 4), ramp[..., 3:7, 3:7])
