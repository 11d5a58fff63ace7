"""Names of the published code: latency keys and the weights of a derived network.

Its stage1 is stage 3 of Table 1, and it calls the activations relu, relu6, swish and h-swish.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tfnas.fields import describe, suggestion
from tfnas.space import ACTIVATIONS, KERNEL_SIZES, STRIDES, OpKey

ACT_TO_PUBLISHED = {act: act for act in ACTIVATIONS} | {"hard_swish": "h-swish"}
ACT_FROM_PUBLISHED = {name: act for act, name in ACT_TO_PUBLISHED.items()}

_KEY = re.compile(r"MBInvertedResBlock_(\d+)_(\d+)_(\d+)_(\d+)_k(\d+)_s(\d+)_([\w-]+)", re.ASCII)


def published_key(key: OpKey) -> str:
    """The published table's name of a curve: `MBInvertedResBlock_{hw}_{in}_{se}_{out}_k{k}_s{s}_{act}`."""
    return (
        f"MBInvertedResBlock_{key.resolution}_{key.in_channels}_{key.se_channels}_{key.out_channels}"
        f"_k{key.kernel_size}_s{key.stride}_{ACT_TO_PUBLISHED[key.act]}"
    )


def parse_published_key(name: str) -> OpKey:
    """Inverse of `published_key`; a `ValueError` says what is wrong with `name`."""
    match = _KEY.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(
            f"published latency key: expected MBInvertedResBlock_<hw>_<in>_<se>_<out>_k<k>_s<s>_<act>, "
            f"got {describe(name)}"
        )
    resolution, in_channels, se_channels, out_channels, kernel_size, stride = map(int, match.groups()[:-1])
    checks = (("k", kernel_size, KERNEL_SIZES), ("s", stride, STRIDES), ("act", match[7], ACT_FROM_PUBLISHED))
    for what, value, allowed in checks:
        if value not in allowed:
            raise ValueError(
                f"published latency key {name}: {what} must be one of {', '.join(map(str, allowed))}, got {value}"
            )
    if min(resolution, in_channels, out_channels) < 1:
        raise ValueError(f"published latency key {name}: hw, in and out must be at least 1")
    return OpKey(resolution, in_channels, out_channels, kernel_size, stride, se_channels, ACT_FROM_PUBLISHED[match[7]])


_WEIGHT_NAMES = (
    ("first_stem.conv.", "stem.conv_stem."),
    ("first_stem.bn.", "stem.bn1."),
    ("second_stem.", "stem.block."),
    ("feature_mix_layer.conv.", "head.conv_head."),
    ("feature_mix_layer.bn.", "head.bn2."),
    ("classifier.linear.", "head.classifier."),
)
_BLOCK_WEIGHT_NAMES = (
    ("inverted_bottleneck.conv.", "conv_pw."),
    ("inverted_bottleneck.bn.", "bn1."),
    ("depth_conv.conv.", "conv_dw."),
    ("depth_conv.bn.", "bn2."),
    ("squeeze_excite.", "se."),
    ("point_linear.conv.", "conv_pwl."),
    ("point_linear.bn.", "bn3."),
)


def published_weight_name(name: str) -> str:
    """The published derived network's name of a parameter or buffer of `network.Network`."""
    for theirs, ours in _WEIGHT_NAMES:
        if name.startswith(ours):
            return theirs + _published_block_name(name.removeprefix(ours))
    match = re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"weight name: expected one of a derived network, got {name!r}")
    return f"stage{int(match[1]) + 1}.{match[2]}.{_published_block_name(match[3])}"


def _published_block_name(name: str) -> str:
    for theirs, ours in _BLOCK_WEIGHT_NAMES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def weights_from_published(state_dict: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of the published derived network under the names of `network.Network`, for its `load_state_dict`.

    Args:
        state_dict: Theirs, with or without DataParallel's `module.` prefix.
        names: The keys wanted: `network.state_dict()`.

    Raises:
        ValueError: Naming the first weight that is missing, or the first one nothing asks for.
    """
    theirs = {name.removeprefix("module."): value for name, value in state_dict.items()}
    result = {}
    for name in names:
        published = published_weight_name(name)
        if published not in theirs:
            raise ValueError(f"published weights: {published} is missing{suggestion(published, theirs)}")
        result[name] = theirs.pop(published)
    if theirs:
        raise ValueError(f"published weights: {next(iter(theirs))} belongs to no layer of this architecture")
    return result
