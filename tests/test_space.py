"""Table 1 to the letter, and the arithmetic of widths."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from tfnas.space import SKIP, Candidate, Layer, Space
from tfnas.space_io import load_space


def test_imagenet_is_table_1() -> None:
    space = load_space("imagenet")
    rows = [
        (layer.resolution, layer.in_channels, layer.out_channels, layer.stride, layer.act) for layer in space.layers
    ]
    assert rows == [
        (112, 16, 24, 2, "relu"),
        (56, 24, 24, 1, "relu"),
        (56, 24, 40, 2, "swish"),
        *[(28, 40, 40, 1, "swish")] * 2,
        (28, 40, 80, 2, "swish"),
        *[(14, 80, 80, 1, "swish")] * 3,
        (14, 80, 112, 1, "swish"),
        *[(14, 112, 112, 1, "swish")] * 3,
        (14, 112, 192, 2, "swish"),
        *[(7, 192, 192, 1, "swish")] * 3,
        (7, 192, 320, 1, "swish"),
    ]
    assert [stage.depth for stage in space.stages] == [2, 3, 4, 4, 4, 1]
    assert (space.out_resolution, space.head_channels, space.num_classes) == (7, 1280, 1000)
    assert (space.stem_channels, space.fixed_channels, space.fixed_se_channels) == (32, 16, 8)
    assert len(space.keys) == 66
    assert space.depth_space == "sink"


def test_imagenet_candidates_are_table_1() -> None:
    space = load_space("imagenet")
    names = ["k3_e3", "k3_e3_se1", "k5_e3", "k5_e3_se1", "k3_e6", "k3_e6_se2", "k5_e6", "k5_e6_se2"]
    assert [candidate.name for candidate in space.candidates] == names
    for layer, (c, candidate) in itertools.product(space.layers, enumerate(space.candidates)):
        n = layer.in_channels
        wide = "_e6" in candidate.name
        assert candidate.kernel_size == int(candidate.name[1])
        assert (layer.min_width(c), layer.start_width(c), layer.max_width(c)) == (
            (4 * n, 6 * n, 8 * n) if wide else (2 * n, 3 * n, 4 * n)
        )
        assert layer.se_channels(c) == (0 if "_se" not in candidate.name else 2 * n if wide else n)


def test_no_se_space_keeps_the_fixed_blocks_se() -> None:
    space, full = load_space("imagenet-no-se"), load_space("imagenet")
    assert [candidate.name for candidate in space.candidates] == ["k3_e3", "k5_e3", "k3_e6", "k5_e6"]
    assert all(key.se_channels == 0 for key in space.keys)
    assert space.fixed_se_channels == 8
    assert replace(space, name=full.name, candidates=full.candidates) == full


@pytest.mark.parametrize("resolution", [28, 32, 33, 48, 64])
def test_small_suits_small_images(resolution: int) -> None:
    space = load_space("small", {"resolution": resolution})
    assert len(space.layers) == 10
    assert space.out_resolution == -(-resolution // 8)


def test_skip_is_the_last_candidate_of_every_layer_but_a_stages_first() -> None:
    space = load_space("imagenet", {"depth_space": "skip-in"})
    for layer in space.layers:
        assert (layer.candidates[-1] == SKIP) == (layer.position > 0)
        assert layer.has_residual or layer.position == 0
    assert (space.max_candidates, space.max_depth) == (9, 4)
    assert space.keys == load_space("imagenet").keys
    skipped = space.layers[1]
    assert (skipped.min_width(8), skipped.start_width(8), skipped.max_width(8), skipped.se_channels(8)) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="layer 1 has no latency key"):
        skipped.key(8)


@pytest.mark.parametrize("depth_space", ["sink", "skip-out"])
def test_other_depth_spaces_have_no_skip_candidate(depth_space: str) -> None:
    space = load_space("imagenet", {"depth_space": depth_space})
    assert space.max_candidates == 8
    assert all(layer.candidates == space.candidates for layer in space.layers)


def _layer(in_channels: int, candidate: Candidate) -> Layer:
    return Layer(0, 0, 0, 28, in_channels, in_channels, 1, "relu", (candidate,))


def test_widths_are_whole_and_ordered() -> None:
    for in_channels in range(1, 200):
        layer = _layer(in_channels, Candidate("c", 3, 2.2, 2.2, 4.7, 0.5))
        assert 2.2 * in_channels <= layer.min_width(0) + 1e-9
        assert layer.min_width(0) - 1 < 2.2 * in_channels
        assert layer.min_width(0) <= layer.start_width(0) <= layer.max_width(0)
        assert abs(layer.max_width(0) - 4.7 * in_channels) <= 0.5 + 1e-9


def test_min_width_ignores_binary_rounding() -> None:
    assert 1.1 * 50 > 55
    assert _layer(50, Candidate("c", 3, 3, 1.1, 4)).min_width(0) == 55


def test_spaces_compare_and_hash() -> None:
    first, second = load_space("imagenet"), load_space("imagenet")
    assert first == second
    assert hash(first) == hash(second)
    assert isinstance(first, Space)
    assert first.layers is first.layers
