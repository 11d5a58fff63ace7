"""IDX, .npz, fake and shipped images."""

from __future__ import annotations

import gzip
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import arrays, idx_bytes, idx_folder
from tfnas.data import DataOptions, build_data
from tfnas.data.idx import read_idx
from tfnas.data.sources import FASHION_MNIST_FOLDER, QUICKSTART_FOLDER, open_source

ROOT = Path(__file__).parents[1]


def raw(source: str, part: str = "train", **options: object) -> torch.Tensor:
    found = getattr(open_source(DataOptions(source, **options), 0), part)  # type: ignore[arg-type]
    return found.images.gather(np.arange(len(found.labels)))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("by_file", [False, True])
def test_idx_gives_the_arrays(tmp_path: Path, zipped: bool, by_file: bool) -> None:
    folder = idx_folder(tmp_path, zipped=zipped)
    path = folder / f"train-images-idx3-ubyte{'.gz' if zipped else ''}" if by_file else folder
    source = open_source(DataOptions(str(path)), 0)
    for part, count in ((source.train, 40), (source.test, 12)):
        assert part is not None
        images, labels = arrays(count)
        assert np.array_equal(part.images.gather(np.arange(count)).numpy()[:, 0], images)  # type: ignore[union-attr]
        assert np.array_equal(part.labels, labels)
        assert part.class_names == ("0", "1", "2", "3")


def test_a_set_plain_and_gzipped_is_one_set(tmp_path: Path) -> None:
    idx_folder(tmp_path)
    idx_folder(tmp_path, zipped=True)
    assert build_data(DataOptions(str(tmp_path)), 0).train.num_images == 32


@pytest.mark.parametrize(("code", "dtype"), [(9, ">i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")])
def test_idx_reads_every_type(tmp_path: Path, code: int, dtype: str) -> None:
    array = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    (tmp_path / "x").write_bytes(idx_bytes(array, code))
    read = read_idx(tmp_path / "x")
    assert np.array_equal(read, array)
    assert read.dtype.isnative


@pytest.mark.parametrize("names", [("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels")])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (3, 8, 8), (8, 8, 1)])
def test_npz_in_every_layout(tmp_path: Path, names: tuple[str, str], shape: tuple[int, ...]) -> None:
    images, labels = arrays(shape=shape)
    np.savez_compressed(tmp_path / "a.npz", **{names[0]: images, names[1]: labels[:, None].astype(np.int64)})
    pixels = raw(str(tmp_path / "a.npz")).numpy()
    expected = images if shape == (3, 8, 8) else images.reshape(40, 8, 8, -1).transpose(0, 3, 1, 2)
    assert np.array_equal(pixels, expected)


def test_npz_brings_test_images_and_class_names(tmp_path: Path) -> None:
    images, labels = arrays()
    test_images, test_labels = arrays(8)
    np.savez(
        tmp_path / "a.npz",
        train_images=images, train_labels=labels, test_images=test_images, test_labels=test_labels,
        class_names=np.array(["a", "b", "c", "d"]),
    )  # fmt: skip
    bundle = build_data(DataOptions(str(tmp_path / "a.npz"), classes=["d", "b"]), 0)
    assert bundle.class_names == ("b", "d")
    assert bundle.test is not None
    assert bundle.test.num_images == 4


def test_test_source_names_other_test_images(tmp_path: Path) -> None:
    idx_folder(tmp_path / "a", test=False)
    idx_folder(tmp_path / "b")
    assert build_data(DataOptions(str(tmp_path / "a")), 0).test is None
    named = build_data(DataOptions(str(tmp_path / "a"), test_source=str(tmp_path / "b/t10k-images-idx3-ubyte")), 0)
    assert named.test is not None
    assert named.test.num_images == 12


def test_gray_and_colour_are_converted_to_the_channels_asked_for(tmp_path: Path) -> None:
    images, labels = arrays(shape=(8, 8, 3))
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    gray = raw(str(tmp_path / "a.npz"), image_channels=1).numpy()[:, 0]
    assert abs(gray - images @ np.array([0.299, 0.587, 0.114])).max() <= 0.51
    np.savez(tmp_path / "b.npz", images=images[..., 0], labels=labels)
    colour = raw(str(tmp_path / "b.npz"), image_channels=3).numpy()
    assert np.array_equal(colour, np.repeat(images[:, None, :, :, 0], 3, axis=1))


def test_a_resolution_resizes(tmp_path: Path) -> None:
    images, labels = arrays(shape=(8, 6))
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    bundle = build_data(DataOptions(str(tmp_path / "a.npz"), resolution=12, image_channels=3), 0)
    assert bundle.image_shape == (3, 12, 12)
    for loader in (bundle.train, bundle.held_out):
        assert next(loader.epoch(0))[0].shape[1:] == (3, 12, 12)


def test_statistics_are_those_of_the_training_images() -> None:
    bundle = build_data(DataOptions(crop="none", flip=False), 1)
    images = torch.cat([x for x, _ in bundle.train.epoch(0)]).double()
    assert abs(images.mean()) < 1e-6
    assert abs(images.std(unbiased=False) - 1) < 1e-6


def test_mean_and_std_can_be_given() -> None:
    bundle = build_data(DataOptions(mean=(0.5,), std=(0.5,), crop="none"), 1)
    images = next(bundle.train.epoch(0))[0]
    assert images.min() == -1
    assert images.max() <= 1


def test_the_shipped_subset_is_balanced_real_and_about_a_megabyte() -> None:
    source = open_source(DataOptions("quickstart"), 0)
    assert source.test is not None
    assert np.array_equal(np.bincount(source.train.labels), [200] * 10)
    assert np.array_equal(np.bincount(source.test.labels), [50] * 10)
    assert source.train.class_names[9] == "Ankle boot"
    assert sum(path.stat().st_size for path in QUICKSTART_FOLDER.iterdir()) < 1.2e6
    assert {"README.md", "LICENSE"} <= {path.name for path in QUICKSTART_FOLDER.iterdir()}


def test_the_shipped_classes_can_be_told_apart() -> None:
    """Nearest class mean: wrong labels or shuffled images would leave a tenth."""
    source = open_source(DataOptions("quickstart"), 0)
    assert source.test is not None
    train, test = raw("quickstart").float().flatten(1), raw("quickstart", "test").float().flatten(1)
    means = torch.stack([train[torch.from_numpy(source.train.labels == c)].mean(0) for c in range(10)])
    found = torch.cdist(test, means).argmin(1)
    assert (found == torch.from_numpy(source.test.labels)).float().mean() > 0.6


@pytest.mark.skipif(not FASHION_MNIST_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_shipped_subset_is_what_its_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make", "--output", str(tmp_path)])
    runpy.run_path(str(ROOT / "tools/make_fashion_mnist_subset.py"), run_name="__main__")
    for made in sorted(tmp_path.iterdir()):
        # The compressed bytes may differ with zlib's version, what they hold may not.
        assert gzip.decompress(made.read_bytes()) == gzip.decompress((QUICKSTART_FOLDER / made.name).read_bytes())


@pytest.mark.skipif(not FASHION_MNIST_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_whole_set_by_name() -> None:
    bundle = build_data(DataOptions("fashion-mnist"), 0)
    assert bundle.test is not None
    assert (bundle.train.num_images, bundle.held_out.num_images, bundle.test.num_images) == (48_000, 12_000, 10_000)


def test_fake_classes_can_be_learnt_and_images_differ() -> None:
    source = open_source(DataOptions("fake", num_classes=6, resolution=16), 2)
    assert source.test is not None
    train, test = (part.images.gather(np.arange(len(part.labels))) for part in (source.train, source.test))  # type: ignore[union-attr]
    assert train.shape == (120, 3, 16, 16)
    assert len(torch.unique(torch.cat((train, test)).flatten(1), dim=0)) == 150
    flat = train.float().flatten(1)
    means = torch.stack([flat[torch.from_numpy(source.train.labels == c)].mean(0) for c in range(6)])
    found = torch.cdist(test.float().flatten(1), means).argmin(1)
    assert (found == torch.from_numpy(source.test.labels)).float().mean() > 0.9
    again = open_source(DataOptions("fake", num_classes=6, resolution=16), 2)
    assert torch.equal(again.train.images.gather(np.array([7])), train[7:8])  # type: ignore[union-attr]


def test_arrays_need_no_torchvision() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None; sys.modules['PIL'] = None\n"
        "from tfnas.data import DataOptions, build_data\n"
        "for options in (DataOptions(), DataOptions('fake', crop='resized', color_jitter=(0.4, 0.4, 0.4, 0.2))):\n"
        "    print(next(build_data(options, 0).train.epoch(0))[0].shape[0])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["32", "32"]


def test_arrays_are_read_fast_enough() -> None:
    """Sanity on a busy machine: decoding or augmenting image by image would be far slower."""
    train = build_data(DataOptions(batch_size=64), 0).train
    rates = []
    for epoch in range(4):
        start = time.perf_counter()
        count = sum(len(y) for _, y in train.epoch(epoch))
        rates.append(count / (time.perf_counter() - start))
    assert max(rates) > 400
