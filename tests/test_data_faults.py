"""Unusable data: each fault is named, with what was expected, before the first step where it can be seen before."""

from __future__ import annotations

import gzip
import os
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import arrays, idx_bytes, idx_folder, image_folder, picture
from PIL import Image
from tfnas.data import DataError, DataOptions, build_data
from tfnas.data.decode import decode
from tfnas.data.idx import read_idx
from tfnas.data.npz import read_npz

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def refused(options: DataOptions, *parts: str) -> str:
    """The message with which `build_data` refuses, checked to hold `parts`."""
    with pytest.raises(DataError) as raised:
        build_data(options, 0)
    message = str(raised.value)
    for part in parts:
        assert part in message
    return message


def folder_options(folder: Path, **changes: object) -> DataOptions:
    return replace(DataOptions(str(folder), resolution=8, batch_size=4), **changes)  # type: ignore[arg-type]


# options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "source: expected a name"),
        ({"held_out_fraction": 0.0}, "held_out_fraction: expected a number between 0 and 1, got 0.0"),
        ({"held_out_fraction": 1.0}, "held_out_fraction"),
        ({"held_out_fraction": float("nan")}, "held_out_fraction"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"evaluation_batch_size": 0}, "evaluation_batch_size"),
        ({"resolution": 0}, "resolution"),
        ({"num_classes": 0}, "num_classes"),
        ({"padding": -1}, "padding"),
        ({"workers": -1}, "workers"),
        ({"fake_images_per_class": 1}, "fake_images_per_class: expected at least 2, got 1"),
        ({"image_channels": 2}, "image_channels: expected 1 or 3, got 2"),
        ({"format": "csv"}, "format: expected auto, folder, list, idx or npz, got 'csv'"),
        ({"crop": "center"}, "crop: expected auto, pad, resized or none, got 'center'"),
        ({"classes": 0}, "classes: expected names or a number of at least 1, got 0"),
        ({"classes": []}, "classes"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "color_jitter: expected brightness"),
        ({"color_jitter": (-0.1, 0.4, 0.4, 0.2)}, "color_jitter"),
        ({"std": (0.0,)}, "std: expected numbers above 0"),
    ],
)
def test_an_option_out_of_range_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        DataOptions(**changes)  # type: ignore[arg-type]


def test_options_that_do_not_suit_the_images_are_named() -> None:
    refused(DataOptions(mean=(0.5, 0.5, 0.5)), "mean: expected 1 numbers, one per channel, got 3")
    refused(DataOptions(num_classes=11), "num_classes: expected 10 (the source's), got 11")
    refused(DataOptions(classes=11), "classes: expected at most 10", "got 11")
    refused(DataOptions(classes=["Bag", "Sandals"]), "'Sandals'", "did you mean 'Sandal'?")
    refused(DataOptions(classes=["Bag", "Bag"]), "classes: expected every name once")
    refused(DataOptions(device="gpu"), "device: expected cpu or cuda", "'gpu'")
    refused(DataOptions(device="meta"), "device: expected cpu or cuda", "'meta'")
    if not torch.cuda.is_available():
        refused(DataOptions(device="cuda"), "device: cuda asked for", "sees no GPU; use cpu")


def test_a_source_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(DataOptions(str(tmp_path / "nothing")), "expected quickstart, fake, fashion-mnist or an existing path")
    monkeypatch.setattr("tfnas.data.sources.FASHION_MNIST_FOLDER", tmp_path / "nothing")
    refused(DataOptions("fashion-mnist"), "does not exist; install Debian's package dataset-fashion-mnist")


# image folders


def test_an_empty_folder_and_one_without_class_folders(tmp_path: Path) -> None:
    refused(folder_options(tmp_path), str(tmp_path), "expected one folder of images per class, got no folders")
    picture(0).save(tmp_path / "a.png")
    refused(folder_options(tmp_path), "got no folders")
    refused(replace(folder_options(tmp_path / "a.png"), format="folder"), "expected a folder of class folders")


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    image_folder(tmp_path, 3)
    (tmp_path / "otter").mkdir()
    refused(folder_options(tmp_path), str(tmp_path / "otter"), "expected images of class otter", "got none")
    (tmp_path / "otter/readme.txt").write_text("soon")
    refused(folder_options(tmp_path), "otter", "got none")


def test_a_class_missing_from_the_test_folder_is_named(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 3)
    image_folder(tmp_path / "val", 2, ("cat", "dog"))
    refused(folder_options(tmp_path), str(tmp_path / "val"), "expected a folder for every training class", "red fox")
    image_folder(tmp_path / "val/red fox", 1, ("x",))
    image_folder(tmp_path / "val", 1, ("otter",))
    refused(folder_options(tmp_path), "expected the training classes only, got also otter")


def test_a_class_without_a_held_out_image_is_named(tmp_path: Path) -> None:
    image_folder(tmp_path, 3)
    image_folder(tmp_path, 1, ("otter",))
    refused(folder_options(tmp_path), "class 'otter': expected at least 2 images", "got 1", "`classes`")
    build_data(folder_options(tmp_path, classes=["cat", "dog"]), 0)


def spoil_empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_text(path: Path) -> None:
    path.write_text("<html>404 not found</html>")


def spoil_truncated_png(path: Path) -> None:
    body = path.read_bytes()
    path.write_bytes(body[: len(body) // 2])


def spoil_header_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def spoil_bit_flips(path: Path) -> None:
    body = bytearray(path.read_bytes())
    for i in range(60, len(body) - 20, 5):
        body[i] ^= 0xFF
    path.write_bytes(bytes(body))


def spoil_truncated_jpeg(path: Path) -> None:
    picture(1, (200, 200)).save(path, "jpeg")
    body = path.read_bytes()
    path.write_bytes(body[: len(body) // 2])


SPOILERS = [spoil_empty, spoil_text, spoil_truncated_png, spoil_header_only, spoil_bit_flips, spoil_truncated_jpeg]


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_and_skipped_only_on_request(
    tmp_path: Path, spoil: Callable[[Path], None], workers: int
) -> None:
    image_folder(tmp_path, 4)
    damaged = tmp_path / "dog/image 02.png"
    spoil(damaged)
    with pytest.raises(DataError) as raised:
        list(build_data(folder_options(tmp_path, workers=workers), 0).full_train.epoch(0))
    message = str(raised.value)
    assert str(damaged) in message
    assert "skip_bad_images" in message
    assert "Traceback" not in message
    with pytest.raises(DataError, match="image 02"):
        build_data(folder_options(tmp_path, workers=workers, resident=True), 0)

    bundle = build_data(folder_options(tmp_path, workers=workers, skip_bad_images=True), 0)
    assert bundle.full_train.num_images == 11
    assert len(bundle.skipped) == 1
    assert str(damaged) in bundle.skipped[0]
    assert sum(len(y) for _, y in bundle.full_train.epoch(0)) == 11


def test_an_empty_file_is_found_before_training(tmp_path: Path) -> None:
    image_folder(tmp_path, 4)
    spoil_empty(tmp_path / "dog/image 01.png")
    refused(folder_options(tmp_path), "image 01.png: expected an image file, got an empty one")
    (tmp_path / "dog/image 01.png").unlink()
    (tmp_path / "dog/image 01.png").symlink_to(tmp_path / "gone.png")
    refused(folder_options(tmp_path), "image 01.png: expected an image file, got: No such file")


@pytest.mark.parametrize("skip", [False, True])
def test_a_pipe_among_the_images_is_not_waited_for(tmp_path: Path, skip: bool) -> None:
    image_folder(tmp_path, 4)
    os.mkfifo(tmp_path / "dog/image 99.png")
    message = "image 99.png: expected an image file, got a folder, pipe or device"
    if skip:
        assert message in build_data(folder_options(tmp_path, skip_bad_images=True), 0).skipped[0]
    else:
        refused(folder_options(tmp_path), message)


def test_skipping_whole_classes_away_is_an_error(tmp_path: Path) -> None:
    image_folder(tmp_path, 3)
    for path in (tmp_path / "dog").iterdir():
        spoil_text(path)
    refused(folder_options(tmp_path, skip_bad_images=True), "class 'dog': expected at least 2 images", "got 0")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_without_a_fixed_range_and_of_extreme_size_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x.tif: expected 8 or 16 bits per channel, got 32 \(mode F\)"):
        decode(str(tmp_path / "x.tif"), 3)
    picture(0).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(DataError, match=r"x.png: expected an image of at most 200 pixels, got 16x20"):
        decode(str(tmp_path / "x.png"), 3)


# list files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected lines of `path label`, got none"),
        ("\n \n", "expected lines of `path label`, got none"),
        ("a.png 0\nb.png\n", "line 2: expected `path label`, got 'b.png'"),
        ("a.png 0\n\nb.png cat\n", "line 3: expected a whole number from 0 as label, got cat; give a label_map"),
        ("a.png 0\nb.png -1\n", "line 2: expected a whole number from 0 as label, got -1"),
        ("a.png 0\nb.png 7\n", "line 2: expected a label in 0..1, got 7"),
        ("a.png 0\nb.png 99999999999999999999999\n", "line 2: expected a label in 0..1, got 99999999999999999999"),
        ("a.png 0\nb.png ²\n", "line 2: expected a whole number"),
        ("a.png 0\nb\0.png 0\n", r"line 2: expected a path, got one with a NUL: 'b\x00.png'"),
        (". 0\n. 0\n", "expected an image file, got a folder, pipe or device"),
        ("a.png 0\nb.png 0\n", "a.png: expected an image file, got: No such file"),
    ],
)
def test_a_faulty_list_file_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    refused(folder_options(tmp_path / "list.txt"), str(tmp_path), message)


def test_a_label_outside_the_classes_named_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{i}.png {i % 3}\n" for i in range(9)))
    settings = folder_options(tmp_path / "list.txt", num_classes=2)
    refused(settings, "line 3: expected a label in 0..1, got 2")
    (tmp_path / "map.txt").write_text("0 cat\n1 dog\n")
    mapped = folder_options(tmp_path / "list.txt", label_map=str(tmp_path / "map.txt"))
    refused(mapped, "line 3: expected a label of the label map (2 labels), got 2")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "expected lines of `label class name`"), ("a x\na y\n", "line 2: expected every label once")],
)
def test_a_faulty_label_map_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text("a.png a\nb.png a\n")
    (tmp_path / "map.txt").write_text(text)
    refused(folder_options(tmp_path / "list.txt", label_map=str(tmp_path / "map.txt")), "map.txt", message)
    refused(folder_options(tmp_path / "list.txt", label_map=str(tmp_path / "none.txt")), "none.txt: cannot be read")


def test_a_class_number_without_images_is_named(tmp_path: Path) -> None:
    image_folder(tmp_path, 2, ("a",))
    (tmp_path / "list.txt").write_text("".join(f"a/image 0{i % 2}.png {2 * (i % 2)}\n" for i in range(6)))
    refused(folder_options(tmp_path / "list.txt"), "class '1': expected at least 2 images", "got 0")


# IDX


def idx_refused(tmp_path: Path, name: str, body: bytes, *parts: str) -> None:
    folder = idx_folder(tmp_path, test=False)
    (folder / name).write_bytes(body)
    refused(DataOptions(str(folder)), str(folder / name), *parts)


IMAGES, LABELS = arrays()
IMAGE_BODY = idx_bytes(IMAGES)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "got the first bytes of an empty file"),
        (b"\0\0", "expected an IDX file"),
        (b"PK\3\4" + IMAGE_BODY[4:], "expected an IDX file (two zero bytes, a type code, 1 to 4 dimensions)"),
        (b"\0\0\x0a\3" + IMAGE_BODY[4:], "got the first bytes 00 00 0a 03"),
        (b"\0\0\x08\0" + IMAGE_BODY[4:], "expected an IDX file"),
        (IMAGE_BODY[:9], "expected 3 sizes after the IDX magic number, got the end of the file"),
        (IMAGE_BODY[:-1], "expected 2560 bytes for an array of 40x8x8, got 2559"),
        (IMAGE_BODY + b"x", "expected 2560 bytes for an array of 40x8x8, got more"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, *(2**32 - 1,) * 3) + b"abc", "got 3"),
        (idx_bytes(IMAGES.astype(">f4"), 13), "expected uint8 intensities 0..255, got float32"),
        (idx_bytes(IMAGES[:, 0, 0]), "expected [N, H, W]"),
        (idx_bytes(IMAGES[:0]), "expected at least one image"),
        (gzip.compress(IMAGE_BODY)[:-30], "expected a whole gzip file, got a truncated or damaged one"),
        (gzip.compress(IMAGE_BODY)[:-8] + b"\0" * 8, "expected a whole gzip file"),
        (gzip.compress(IMAGE_BODY)[:5], "expected a whole gzip file"),
    ],
)
def test_a_faulty_idx_file_of_images_is_named(tmp_path: Path, body: bytes, message: str) -> None:
    idx_refused(tmp_path, TRAIN_IMAGES, body, message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (idx_bytes(LABELS[:-1]), "expected as many labels as images (40), got 39"),
        (idx_bytes(IMAGES), "expected one whole number per image, got uint8 [40, 8, 8]"),
        (idx_bytes(LABELS.astype(">f4"), 13), "expected one whole number per image, got float32"),
        (
            idx_bytes(np.where(LABELS == 3, 200, LABELS).astype(np.uint8)),
            "expected labels in 0..39, got 200 at image 3",
        ),
        (idx_bytes(np.where(LABELS == 3, -1, LABELS).astype(np.int8), 9), "got -1 at image 3 (10 such labels)"),
    ],
)
def test_faulty_idx_labels_are_named(tmp_path: Path, body: bytes, message: str) -> None:
    idx_refused(tmp_path, TRAIN_LABELS, body, message)


def test_idx_files_that_are_missing_or_ambiguous(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path)
    (folder / TRAIN_LABELS).unlink()
    refused(DataOptions(str(folder)), f"expected its labels beside it as {TRAIN_LABELS} or {TRAIN_LABELS}.gz")
    (folder / ("letters-" + TRAIN_IMAGES)).write_bytes(b"")
    refused(DataOptions(str(folder)), "expected one file of training images", "name the file itself as source")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_idx(folder / "nothing")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_idx(folder)


def test_test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path)
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((12, 6, 6), dtype=np.uint8)))
    refused(DataOptions(str(folder)), "test images: expected 1x8x8 like the training images, got 1x6x6", "resolution")
    assert build_data(DataOptions(str(folder), resolution=8), 0).test is not None
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(12, 4, dtype=np.uint8)))
    refused(DataOptions(str(folder)), "t10k-labels", "expected labels in 0..3, got 4")


def test_images_that_are_not_square_ask_for_a_resolution(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path, test=False)
    (folder / TRAIN_IMAGES).write_bytes(idx_bytes(np.zeros((40, 6, 8), dtype=np.uint8)))
    refused(DataOptions(str(folder)), "resolution: the images are 6x8, expected square ones")


# .npz


class _Planted:
    """What a pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_objects_in_an_archive_are_never_loaded(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    np.savez(tmp_path / "a.npz", images=np.array([_Planted(trap)] * 4, dtype=object), labels=np.arange(4))
    refused(DataOptions(str(tmp_path / "a.npz")), "a.npz: images: expected a plain array", "never loaded")
    assert not trap.exists()
    np.array([_Planted(trap)], dtype=object).dump(tmp_path / "b.npz")
    refused(DataOptions(str(tmp_path / "b.npz")), "b.npz: expected a whole .npz archive of plain arrays")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"pictures": IMAGES, "labels": LABELS}, "expected arrays train_images + train_labels or"),
        ({"images": IMAGES}, "expected labels beside images, got images"),
        ({"images": IMAGES, "labels": LABELS[:-1]}, "expected as many labels as images (40), got 39"),
        ({"images": IMAGES / 255, "labels": LABELS}, "expected uint8 intensities 0..255, got float64"),
        ({"images": IMAGES, "labels": LABELS / 1}, "expected one whole number per image, got float64"),
        ({"images": IMAGES, "labels": LABELS.astype(np.int64) * 10**12}, "expected labels in 0..39, got 1000000000000"),
        ({"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "b"])}, "expected labels in 0..1, got 2"),
        ({"images": IMAGES, "labels": LABELS, "class_names": np.arange(4)}, "class_names: expected a list of strings"),
        ({"images": np.zeros((4, 8, 8, 2), np.uint8), "labels": LABELS[:4]}, "with 1 or 3 channels"),
    ],
)
def test_a_faulty_archive_is_named(tmp_path: Path, members: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **members)  # type: ignore[arg-type]
    refused(DataOptions(str(tmp_path / "a.npz")), str(tmp_path / "a.npz"), message)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=IMAGES, labels=LABELS)
    body = path.read_bytes()
    for spoilt in (b"", b"text", body[:200], body[:-40], body[:300] + b"\0" * 200 + body[500:]):
        path.write_bytes(spoilt)
        refused(DataOptions(str(path)), "a.npz: expected a whole .npz archive")
    with open(path, "wb") as file:
        np.save(file, IMAGES)
    refused(DataOptions(str(path)), "expected an .npz archive, got a single array")


# anything


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_damage_to_a_file_is_anything_but_an_error_of_data(tmp_path: Path) -> None:
    """Random bytes changed, lost or cut off: read as something else or refused, never another exception."""
    np.savez(tmp_path / "plain.npz", images=IMAGES, labels=LABELS, class_names=np.array(list("abcd")))
    np.savez_compressed(tmp_path / "packed.npz", images=IMAGES, labels=LABELS)
    (tmp_path / "images-idx3-ubyte").write_bytes(IMAGE_BODY)
    (tmp_path / "images-idx3-ubyte.gz").write_bytes(gzip.compress(IMAGE_BODY))
    for extension in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        picture(3, (40, 30)).save(tmp_path / f"image.{extension}")
    picture(3).convert("P").save(tmp_path / "palette.png")
    originals = sorted(tmp_path.iterdir())
    readers: dict[str, Callable[[Path], object]] = {".npz": read_npz, ".gz": read_idx, "": read_idx}
    seed = int(os.environ.get("TFNAS_TEST_SEED", "20"))
    random = np.random.default_rng(seed)
    refusals = 0
    for _ in range(6000 if os.environ.get("TFNAS_SLOW") else 400):
        original = originals[random.integers(len(originals))]
        damaged = tmp_path / f"damaged{original.suffix}"
        damaged.write_bytes(_damaged(original.read_bytes(), random))
        refusals += _is_refused(readers.get(original.suffix, _decode), damaged, f"seed {seed}, {original.name}")
    assert refusals > 100


def _decode(path: Path) -> object:
    return decode(str(path), 3)


def _is_refused(read: Callable[[Path], object], path: Path, case: str) -> bool:
    try:
        read(path)
    except Exception as error:
        if not isinstance(error, DataError) or str(path) not in str(error):
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
        return True
    return False


def _damaged(body: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(body)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = int(random.integers(min(len(changed), random.choice((64, 400, 10**6)))))
        kind = random.integers(4)
        if kind == 0:
            changed[at] = random.integers(256)
        elif kind == 1:
            del changed[at : at + int(random.integers(1, 9))]
        elif kind == 2:
            changed[at : at + 4] = (b"\xff" * 4, b"\x7f" + b"\xff" * 3, bytes(4))[random.integers(3)]
        else:
            changed = changed[:at]
        changed = changed or bytearray(b"x")
    return bytes(changed)


# loaders


def test_too_few_images_for_a_step(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES[:2], labels=np.zeros(2, dtype=np.int64))
    refused(DataOptions(str(tmp_path / "a.npz")), "expected at least 2 training images for a step", "got 1")
