"""Order, restart, dropping and sharing out of batches, through `build_data`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tfnas.data import DataError, DataOptions, build_data
from tfnas.data.images import ArrayImages
from tfnas.data.keyed_random import Purpose, philox4x32, sample_seeds, shuffled, uniforms
from tfnas.data.loader import Loader
from tfnas.data.normalisation import Normalisation
from tfnas.data.tensor_reader import TensorReader

FAKE = DataOptions(source="fake", num_classes=5, fake_images_per_class=21, resolution=8, batch_size=8)


def equal(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def numbered_loader(count: int, **changes: object) -> Loader:
    """Images that hold their own number, so that a batch tells which samples it is made of."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    settings = dict(batch_size=4, seed=0, shuffle=True, training=True, device=torch.device("cpu")) | changes
    plain = Normalisation((0.0,), (1 / 255,), torch.device("cpu"))
    samples = np.arange(count, dtype=np.int64)
    return Loader(TensorReader(ArrayImages(pixels), 1, 0), samples % 3, samples, plain, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox4x32(tuple(np.array([c], dtype=np.uint64) for c in counter), key)
    assert tuple(int(word[0]) for word in words) == expected


def test_uniforms_are_uniform_and_depend_on_every_key() -> None:
    samples = np.arange(20_000, dtype=np.int64)
    draw = uniforms(7, Purpose.AUGMENTATION, 3, samples, 5)
    assert draw.dtype == np.float32
    assert draw.min() >= 0
    assert draw.max() < 1
    counts = np.histogram(draw, bins=20, range=(0, 1))[0]
    expected = draw.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # 19 degrees of freedom: p below 1e-4
    assert abs(np.corrcoef(draw.T) - np.eye(5)).max() < 0.03
    for other in (
        uniforms(8, Purpose.AUGMENTATION, 3, samples, 5),
        uniforms(7 + 2**32, Purpose.AUGMENTATION, 3, samples, 5),
        uniforms(7, Purpose.SPLIT, 3, samples, 5),
        uniforms(7, Purpose.AUGMENTATION, 4, samples, 5),
        uniforms(7, Purpose.AUGMENTATION, 3, samples + 1, 5),
    ):
        assert (draw == other).mean() < 0.001
    np.testing.assert_array_equal(draw[100:103], uniforms(7, Purpose.AUGMENTATION, 3, samples[100:103], 5))
    assert len(np.unique(sample_seeds(7, 0, samples))) == len(samples)


def test_shuffling_is_a_permutation_without_position_bias() -> None:
    samples = np.arange(10, dtype=np.int64)
    orders = np.array([shuffled(1, Purpose.ORDER, epoch, samples) for epoch in range(2000)])
    assert (np.sort(orders, axis=1) == samples).all()
    assert abs(orders.mean(axis=0) - 4.5).max() < 0.35  # five standard errors


def test_an_epoch_restarts_at_any_step_bit_for_bit() -> None:
    train = build_data(FAKE, seed=3).train
    whole = list(train.epoch(4))
    assert len(whole) == len(train)
    for step in range(len(train) + 1):
        assert equal(list(build_data(FAKE, seed=3).train.epoch(4, step)), whole[step:])


def test_a_stream_goes_through_the_epochs_and_starts_anywhere() -> None:
    held_out = build_data(FAKE, seed=3).held_out
    steps = len(held_out)
    expected = [batch for epoch in range(3) for batch in held_out.epoch(epoch)]
    stream = held_out.stream(steps + 1)
    assert equal([next(stream) for _ in range(steps)], expected[steps + 1 : 2 * steps + 1])


def test_epochs_and_seeds_differ_in_order_and_augmentation() -> None:
    bundle, other = build_data(FAKE, seed=3), build_data(FAKE, seed=4)
    assert not np.array_equal(bundle.train.indices(0)[0], bundle.train.indices(1)[0])
    assert not np.array_equal(bundle.train.samples, other.train.samples)
    sample = bundle.train.samples[:1]
    reader = bundle.train._reader
    first, second = (next(reader.read(epoch, [sample])) for epoch in (0, 5))
    assert not torch.equal(first, second)


def test_an_image_is_augmented_alike_whatever_its_batch_holds() -> None:
    small = build_data(FAKE, seed=3).train
    large = build_data(DataOptions(**(vars(FAKE) | {"batch_size": 50})), seed=3).train
    images = [torch.cat([x for x, _ in loader.epoch(2)]) for loader in (small, large)]
    count = min(map(len, images))
    assert torch.equal(images[0][:count], images[1][:count])


def test_batches_are_normalised_channels_last_floats_with_long_labels() -> None:
    images, labels = next(build_data(FAKE, seed=0).train.epoch(0))
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == ((8, 3, 8, 8), torch.float32, (8,), torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(9, 4, [4, 4]), (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3]), (1, 4, []), (3, 1, [1, 1, 1])],
)
def test_training_drops_a_last_batch_of_one_only(count: int, batch_size: int, sizes: list[int]) -> None:
    loader = numbered_loader(count, batch_size=batch_size)
    assert [len(y) for _, y in loader.epoch(0)] == sizes
    assert len(loader) == len(sizes)
    assert loader.num_images == count


def test_evaluation_never_drops() -> None:
    loader = numbered_loader(9, training=False, shuffle=False)
    images = torch.cat([x for x, _ in loader.epoch(0)])
    assert len(loader) == 3
    assert torch.equal(images.flatten(), torch.arange(9.0))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("count", [24, 25, 26, 29])
def test_processes_share_each_step_out(count: int, world_size: int) -> None:
    alone = numbered_loader(count, batch_size=4 * world_size).indices(1)
    shares = [numbered_loader(count, rank=r, world_size=world_size).indices(1) for r in range(world_size)]
    for step in range(len(shares[0])):
        assert np.array_equal(np.concatenate([share[step] for share in shares]), alone[step])
        assert min(len(share[step]) for share in shares) >= 2


@pytest.mark.parametrize(("count", "shares"), [(17, [[4, 4, 1], [4, 4]]), (20, [[4, 4, 2], [4, 4, 2]])])
def test_evaluation_in_processes_reads_every_image_once_and_no_empty_batch(count: int, shares: list[list[int]]) -> None:
    loaders = [numbered_loader(count, training=False, rank=rank, world_size=2) for rank in range(2)]
    batches = [list(loader.epoch(0)) for loader in loaders]
    assert [[len(labels) for _, labels in own] for own in batches] == shares
    seen = torch.cat([images.flatten() for own in batches for images, _ in own])
    assert torch.equal(seen.sort().values, torch.arange(float(count)))


@pytest.mark.parametrize(("count", "sizes"), [(17, [4, 4]), (20, [4, 4, 2]), (19, [4, 4])])
def test_batch_norm_in_processes_gets_no_batch_of_one(count: int, sizes: list[int]) -> None:
    for rank in range(2):
        loader = numbered_loader(count, training=False, rank=rank, world_size=2).for_batch_norm()
        assert [len(labels) for _, labels in loader.epoch(0)] == sizes
    with pytest.raises(DataError, match=r"at least 4 for 2 process\(es\), got 3"):
        numbered_loader(3, training=False, rank=1, world_size=2).for_batch_norm()


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [(9, 4, [4, 4]), (10, 4, [4, 4, 2]), (3, 1, [1, 1, 1])])
def test_batch_norm_gets_no_last_batch_of_one(count: int, batch_size: int, sizes: list[int]) -> None:
    loader = numbered_loader(count, training=False, batch_size=batch_size)
    assert [len(labels) for _, labels in loader.for_batch_norm().epoch(0)] == sizes
    assert sum(len(labels) for _, labels in loader.epoch(0)) == count
    with pytest.raises(DataError, match=r"held-out images: expected at least 2 for 1 process\(es\), got 1"):
        numbered_loader(1, training=False).for_batch_norm()


def test_labels_belong_to_their_images() -> None:
    for images, labels in numbered_loader(30).epoch(2):
        assert torch.equal(images.flatten().long() % 3, labels)


def test_a_start_step_outside_the_epoch_is_refused() -> None:
    loader = numbered_loader(8)
    for step in (-1, 3):
        with pytest.raises(DataError, match=r"start_step: expected 0\.\.2 .* got"):
            loader.epoch(0, step)


def test_reading_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(build_data(FAKE, seed=0).train.epoch(0))
    assert torch.equal(torch.rand(3), expected)
