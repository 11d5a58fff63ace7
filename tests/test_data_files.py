"""Image folders and list files: what is found, how it is decoded, and that workers change nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import CLASSES, image_folder, picture
from PIL import Image
from tfnas.data import DataError, DataOptions, build_data
from tfnas.data.decode import decode
from tfnas.data.images import FileImages
from tfnas.data.sources import open_source

pytest.importorskip("torchvision.transforms.v2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


def options(folder: Path, **changes: object) -> DataOptions:
    return replace(DataOptions(str(folder), resolution=8, batch_size=5), **changes)  # type: ignore[arg-type]


def paths(source: object) -> list[str]:
    assert isinstance(source, FileImages)
    return [source.path(i) for i in range(len(source))]


def test_a_folder_is_one_class_per_folder(folder: Path) -> None:
    train = open_source(options(folder), 0).train
    assert train.class_names == CLASSES
    assert np.array_equal(np.bincount(train.labels), [10, 10, 10])
    assert all(
        Path(path).parent.name == CLASSES[label] for path, label in zip(paths(train.images), train.labels, strict=True)
    )


def test_train_and_val_folders_are_training_and_test_images(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 5)
    image_folder(tmp_path / "val", 2)
    bundle = build_data(options(tmp_path), 0)
    assert bundle.test is not None
    assert (bundle.full_train.num_images, bundle.test.num_images) == (15, 6)


def test_folders_inside_class_folders_are_searched_and_loops_end(tmp_path: Path) -> None:
    image_folder(tmp_path, 3)
    (tmp_path / "cat/more").mkdir()
    picture(99).save(tmp_path / "cat/more/extra.JPG", "jpeg")
    (tmp_path / "cat/more/loop").symlink_to(tmp_path / "cat")
    (tmp_path / "cat/notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    train = open_source(options(tmp_path), 0).train
    assert np.array_equal(np.bincount(train.labels), [4, 3, 3])


@pytest.mark.parametrize("crop", ["auto", "pad", "none"])
def test_workers_and_restarts_change_nothing(folder: Path, crop: str) -> None:
    alone = build_data(options(folder, crop=crop), 7)
    shared = build_data(options(folder, crop=crop, workers=2), 7)
    whole = list(alone.train.epoch(3))
    for step in (0, 2):
        again = list(shared.train.epoch(3, step))
        for (x, y), (u, v) in zip(whole[step:], again, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)
    other_epoch = next(alone.train.epoch(4))[0]
    assert not torch.equal(other_epoch, whole[0][0])


def test_an_interrupt_leaves_the_decision_to_the_main_process(folder: Path) -> None:
    train = build_data(options(folder, batch_size=2, workers=1), 0).train
    batches = train.epoch(0)
    first = next(batches)
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGINT)
    rest = list(batches)
    assert len(rest) == len(train) - 1 > 5
    assert torch.equal(first[0], next(train.epoch(0))[0])


def test_files_are_delivered_as_arrays_are(folder: Path) -> None:
    bundle = build_data(options(folder), 0)
    for loader in (bundle.train, bundle.held_out):
        images, labels = next(loader.epoch(0))
        assert images.shape == (5, 3, 8, 8)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64


def test_reading_files_leaves_the_global_generator_alone(folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    for workers in (0, 1):
        torch.manual_seed(5)
        next(build_data(options(folder, workers=workers), 0).train.epoch(0))
        assert torch.equal(torch.rand(3), expected)


def test_evaluation_is_resize_and_central_crop(tmp_path: Path) -> None:
    from torchvision.transforms import v2

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture(i, (90, 60)).save(tmp_path / name / f"{i}.png")
    held_out = build_data(options(tmp_path, resolution=28, mean=(0.0,) * 3, std=(1 / 255,) * 3), 0).held_out
    found = torch.cat([x for x, _ in held_out.epoch(0)])
    every = [v2.functional.pil_to_tensor(v2.CenterCrop(28)(v2.Resize(32)(picture(i, (90, 60))))) for i in range(2)]
    assert all(min((x - e).abs().max() for e in every) < 1e-3 for x in found)


def test_resident_images_are_those_of_the_files(folder: Path) -> None:
    for crop in ("auto", "pad", "none"):
        from_files = build_data(options(folder, crop=crop, resolution=28), 0)
        resident = build_data(options(folder, crop=crop, resolution=28, resident=True), 0)
        for (x, y), (u, v) in zip(from_files.held_out.epoch(0), resident.held_out.epoch(0), strict=True):
            assert torch.equal(y, v)
            assert torch.equal(x, u), crop
        images, labels = next(resident.train.epoch(0))
        assert images.shape == (5, 3, 28, 28)
        assert torch.equal(labels, next(from_files.train.epoch(0))[1])


def test_a_list_file_names_images_with_blanks_in_their_paths(folder: Path, tmp_path: Path) -> None:
    lines = [f"{CLASSES[i % 3]}/image {i:02d}.png {i % 3}" for i in range(9)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\r\n\n")
    train = open_source(options(tmp_path / "list.txt", list_root=str(folder)), 0).train
    assert np.array_equal(train.labels, [0, 1, 2] * 3)
    assert paths(train.images)[2] == str(folder / "red fox/image 02.png")
    assert train.class_names == ("0", "1", "2")
    absolute = [f"{folder}/{line}" for line in lines]
    (tmp_path / "absolute.txt").write_text("\n".join(absolute))
    assert build_data(options(tmp_path / "absolute.txt"), 0).full_train.num_images == 9


def test_a_byte_order_mark_is_no_part_of_a_path_or_label(folder: Path, tmp_path: Path) -> None:
    lines = [f"{CLASSES[i % 3]}/image {i:02d}.png n0{i % 3}" for i in range(9)]
    (tmp_path / "list.txt").write_text("\n".join(lines), encoding="utf-8-sig")
    (tmp_path / "map.txt").write_text("n00 cat\nn01 dog\nn02 red fox\n", encoding="utf-8-sig")
    settings = options(tmp_path / "list.txt", list_root=str(folder), label_map=str(tmp_path / "map.txt"))
    assert build_data(settings, 0).class_names == CLASSES
    assert build_data(settings, 0).full_train.num_images == 9


def test_a_label_map_gives_names_and_order(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"{CLASSES[i % 3]}/image {i:02d}.png n0{i % 3}" for i in range(9)))
    (tmp_path / "map.txt").write_text("n02 red fox\nn00 cat\nn01 dog\n")
    settings = options(tmp_path / "list.txt", list_root=str(folder), label_map=str(tmp_path / "map.txt"))
    train = open_source(settings, 0).train
    assert train.class_names == ("red fox", "cat", "dog")
    assert np.array_equal(train.labels, [1, 2, 0] * 3)


def test_names_that_are_not_utf8_are_read_and_shown(tmp_path: Path) -> None:
    image_folder(tmp_path, 3)
    strange = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(strange)
    for i in range(2):
        with open(os.path.join(strange, b"b\xff%d.png" % i), "wb") as file:
            picture(i).save(file, "png")
    bundle = build_data(options(tmp_path), 0)
    assert "caf\\xe9" in bundle.class_names
    assert sum(len(y) for _, y in bundle.held_out.epoch(0)) == 4
    with open(os.path.join(strange, b"b\xff0.png"), "wb") as file:
        file.write(b"broken")
    with pytest.raises(DataError, match=r"b\\xff0.png") as raised:
        list(build_data(options(tmp_path), 0).full_train.epoch(0))
    str(raised.value).encode()  # can be printed


PIXELS = np.asarray(picture(5))
GRAY = (PIXELS @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)


def test_every_kind_of_image_is_converted_right(tmp_path: Path) -> None:
    path = str(tmp_path / "x.png")

    def saved(image: Image.Image, name: str = "x.png", channels: int = 3) -> np.ndarray:
        image.save(tmp_path / name)
        decoded = decode(str(tmp_path / name), channels)
        assert decoded.mode == ("L" if channels == 1 else "RGB")
        return np.asarray(decoded).astype(int)

    assert np.array_equal(saved(Image.fromarray(PIXELS)), PIXELS)
    assert abs(saved(Image.fromarray(PIXELS), channels=1) - GRAY).max() <= 1
    assert np.array_equal(saved(Image.fromarray(GRAY)), np.repeat(GRAY[..., None], 3, -1))
    assert np.array_equal(saved(Image.fromarray(GRAY), channels=1), GRAY)
    black_and_white = Image.fromarray(GRAY).convert("1")
    assert set(np.unique(saved(black_and_white))) == {0, 255}

    palette = Image.fromarray(GRAY).quantize(16)
    assert np.array_equal(saved(palette), np.asarray(palette.convert("RGB")))

    alpha = np.full(PIXELS.shape[:2], 255, dtype=np.uint8)
    alpha[:5], alpha[5:8] = 0, 128
    transparent = saved(Image.fromarray(np.dstack([PIXELS, alpha])))
    assert (transparent[:5] == 255).all()
    assert np.array_equal(transparent[8:], PIXELS[8:])
    assert abs(transparent[5:8] - (PIXELS[5:8] * (128 / 255) + 255 * (127 / 255))).max() <= 1
    gray_alpha = saved(Image.fromarray(np.dstack([GRAY, alpha])), channels=1)
    assert (gray_alpha[:5] == 255).all()
    assert np.array_equal(gray_alpha[8:], GRAY[8:])

    palette.save(path, transparency=int(np.asarray(palette)[0, 0]))
    assert (np.asarray(decode(path, 3))[0, 0] == 255).all()

    wide = np.linspace(0, 65535, PIXELS.shape[0] * PIXELS.shape[1]).reshape(PIXELS.shape[:2]).astype(np.uint16)
    for name in ("x.png", "x.tif"):
        assert abs(saved(Image.fromarray(wide), name, channels=1) - wide / 257).max() <= 0.5001
    assert saved(Image.fromarray(wide)).shape == PIXELS.shape

    smooth = Image.fromarray(PIXELS // 3 + 80).resize((64, 64))
    cmyk = saved(smooth.convert("CMYK"), "x.jpg")
    assert abs(cmyk - np.asarray(smooth).astype(int)).mean() < 6
    cmyk_tiff = saved(Image.fromarray(PIXELS).convert("CMYK"), "x.tif")
    assert abs(cmyk_tiff - PIXELS).max() <= 1


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8), value, dtype=np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert (np.asarray(decode(str(tmp_path / "x.gif"), 1)) == 10).all()


def test_without_torchvision_the_message_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = build_data(options(folder), 0).train
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(DataError, match="need torchvision, which does not import") as raised:
        next(train.epoch(0))
    assert torch.__version__ in str(raised.value)
