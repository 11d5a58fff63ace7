"""The published code's names and formats."""

from __future__ import annotations

import random

import pytest
from tfnas.published import parse_published_key, published_key
from tfnas.space_io import load_space

from tests.random_spaces import random_space


def test_published_keys_of_table_1() -> None:
    keys = load_space("imagenet").keys
    assert published_key(keys[0]) == "MBInvertedResBlock_112_16_0_24_k3_s2_relu"
    assert published_key(keys[-1]) == "MBInvertedResBlock_7_192_384_320_k5_s1_swish"
    assert len({published_key(key) for key in keys}) == 66


@pytest.mark.parametrize("seed", range(10))
def test_published_keys_survive_a_round_trip(seed: int) -> None:
    for key in random_space(random.Random(seed)).keys:
        assert parse_published_key(published_key(key)) == key


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base", "expected MBInvertedResBlock_<hw>"),
        ("MBInvertedResBlock_112_16_0_24_k3_s2", "expected MBInvertedResBlock_<hw>"),
        ("MBInvertedResBlock_112_16_-1_24_k3_s2_relu", "expected MBInvertedResBlock_<hw>"),
        ("MBInvertedResBlock_112_16_0_24_k4_s2_relu", "k must be one of 3, 5, 7, got 4"),
        ("MBInvertedResBlock_112_16_0_24_k3_s3_relu", "s must be one of 1, 2, got 3"),
        ("MBInvertedResBlock_112_16_0_24_k3_s2_gelu", "act must be one of relu, relu6, swish, hard_swish, got gelu"),
        ("MBInvertedResBlock_0_16_0_24_k3_s2_relu", "must be at least 1"),
        (7, "expected MBInvertedResBlock_<hw>"),
    ],
)
def test_bad_published_keys(name: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_published_key(name)  # type: ignore[arg-type]
