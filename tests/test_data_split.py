"""Class subsets and the per-class split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tfnas.data import DataError, DataOptions, build_data
from tfnas.data.split import choose_classes, split_by_class


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=8),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63),
)
def test_every_image_is_in_one_part_and_every_class_in_both(sizes: list[int], fraction: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.random.default_rng(seed).permutation(labels)
    names = tuple(str(i) for i in range(len(sizes)))
    train, held_out = split_by_class(labels, names, fraction, seed)
    assert np.array_equal(np.sort(np.concatenate((train, held_out))), np.arange(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    for size, count, rest in zip(sizes, np.bincount(labels[held_out]), np.bincount(labels[train]), strict=True):
        assert rest >= 1
        assert count >= 1
        assert abs(count - fraction * size) <= 0.5 or count == 1 or rest == 1


def test_the_papers_split_is_80_to_20_in_every_class() -> None:
    bundle = build_data(DataOptions("quickstart"), 0)
    labels = {
        name: np.concatenate([y.numpy() for _, y in getattr(bundle, name).epoch(0)]) for name in ("train", "held_out")
    }
    assert np.array_equal(np.bincount(labels["train"]), [160] * 10)
    assert np.array_equal(np.bincount(labels["held_out"]), [40] * 10)
    assert bundle.full_train.num_images == 2000


def test_the_split_follows_the_seed_alone() -> None:
    labels, names = np.arange(300) % 3, ("a", "b", "c")
    first, again, other = (split_by_class(labels, names, 0.2, seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert len(set(first) & set(other)) < 30
    # Images of one class decide nothing about another's: a class more changes no other class's split.
    more = split_by_class(np.concatenate((labels, np.full(50, 3))), (*names, "d"), 0.2, 1)[1]
    assert np.array_equal(more[more < 300], first)


def test_each_image_is_held_out_as_often_as_any_other() -> None:
    counts = np.zeros(50)
    for seed in range(1000):
        counts[split_by_class(np.zeros(50, dtype=np.int64), ("a",), 0.2, seed)[1]] += 1
    assert abs(counts - 200).max() < 60  # standard deviation 12.6


def test_a_number_of_classes_is_chosen_by_the_seed() -> None:
    names = tuple(f"n{i:04d}" for i in range(1000))
    chosen = choose_classes(100, names, 5)
    assert len(np.unique(chosen)) == 100
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, choose_classes(100, names, 5))
    assert not np.array_equal(chosen, choose_classes(100, names, 6))
    assert 350 < chosen.mean() < 650  # 499.5, standard error 27


def test_chosen_classes_keep_their_order_and_are_numbered_from_0() -> None:
    bundle = build_data(DataOptions("quickstart", classes=["Sandal", "Coat", "Trouser"]), 0)
    assert bundle.class_names == ("Trouser", "Coat", "Sandal")
    assert bundle.num_classes == 3
    assert bundle.test is not None
    for loader, per_class in ((bundle.full_train, 200), (bundle.test, 50)):
        labels = np.concatenate([y.numpy() for _, y in loader.epoch(0)])
        assert np.array_equal(np.bincount(labels), [per_class] * 3)


def test_a_class_subset_has_the_images_of_its_classes() -> None:
    everything = build_data(DataOptions("quickstart", batch_size=500), 0)
    subset = build_data(
        DataOptions("quickstart", classes=["Bag"], mean=(0.2,), std=(0.3,), evaluation_batch_size=50), 0
    )
    assert everything.test is not None
    assert subset.test is not None
    images, labels = next(everything.test.epoch(0))
    bags = everything.class_names.index("Bag")
    expected = images[labels == bags] * everything.test.normalisation.std[0] + everything.test.normalisation.mean[0]
    found = next(subset.test.epoch(0))[0] * 0.3 + 0.2
    assert abs(found - expected).max() < 1e-5


def test_a_class_with_one_image_is_named() -> None:
    with pytest.raises(DataError, match=r"class 'b': expected at least 2 images .* got 1"):
        split_by_class(np.array([0, 0, 1]), ("a", "b"), 0.2, 0)
