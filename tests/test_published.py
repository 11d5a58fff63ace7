"""The published code's names and formats."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from random_spaces import random_architecture, random_space
from tfnas.network import build_network
from tfnas.published import parse_published_key, published_key, published_weight_name, weights_from_published
from tfnas.space_io import load_space


def test_published_keys_of_table_1() -> None:
    keys = load_space("imagenet").keys
    assert published_key(keys[0]) == "MBInvertedResBlock_112_16_0_24_k3_s2_relu"
    assert published_key(keys[-1]) == "MBInvertedResBlock_7_192_384_320_k5_s1_swish"
    assert len({published_key(key) for key in keys}) == 66
    hard = replace(keys[0], act="hard_swish")
    assert published_key(hard) == "MBInvertedResBlock_112_16_0_24_k3_s2_h-swish"


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
        ("MBInvertedResBlock_112_16_0_24_k3_s2_gelu", "act must be one of relu, relu6, swish, h-swish, got gelu"),
        ("MBInvertedResBlock_0_16_0_24_k3_s2_relu", "must be at least 1"),
        (7, "expected MBInvertedResBlock_<hw>"),
    ],
)
def test_bad_published_keys(name: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_published_key(name)  # type: ignore[arg-type]


def test_published_weight_names() -> None:
    names = {
        "stem.conv_stem.weight": "first_stem.conv.weight",
        "stem.bn1.running_mean": "first_stem.bn.running_mean",
        "stem.block.conv_dw.weight": "second_stem.depth_conv.conv.weight",
        "stem.block.se.conv_reduce.bias": "second_stem.squeeze_excite.conv_reduce.bias",
        "stages.0.1.conv_pw.weight": "stage1.1.inverted_bottleneck.conv.weight",
        "stages.0.1.bn1.weight": "stage1.1.inverted_bottleneck.bn.weight",
        "stages.5.0.bn2.running_var": "stage6.0.depth_conv.bn.running_var",
        "stages.5.0.se.conv_expand.weight": "stage6.0.squeeze_excite.conv_expand.weight",
        "stages.2.3.conv_pwl.weight": "stage3.3.point_linear.conv.weight",
        "stages.2.3.bn3.num_batches_tracked": "stage3.3.point_linear.bn.num_batches_tracked",
        "head.conv_head.weight": "feature_mix_layer.conv.weight",
        "head.bn2.bias": "feature_mix_layer.bn.bias",
        "head.classifier.bias": "classifier.linear.bias",
    }
    assert {name: published_weight_name(name) for name in names} == names
    with pytest.raises(ValueError, match="expected one of a derived network, got 'blocks"):
        published_weight_name("blocks.0")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weights_load(prefix: str) -> None:
    net = build_network(random_architecture(random.Random(1), load_space("small")))
    state = net.state_dict()
    theirs = {prefix + published_weight_name(name): value for name, value in state.items()}
    assert len(theirs) == len(state)
    loaded = weights_from_published(theirs, state)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    missing = {name: value for name, value in theirs.items() if not name.endswith("classifier.linear.bias")}
    with pytest.raises(ValueError, match=r"classifier\.linear\.bias is missing"):
        weights_from_published(missing, state)
    with pytest.raises(ValueError, match=r"stage9\.x belongs to no layer"):
        weights_from_published(theirs | {"stage9.x": 0}, state)
