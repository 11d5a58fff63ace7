"""Names and formats of the published code: latency keys and the `model.config` JSON of a derived network."""

from __future__ import annotations

import re

from .fields import describe
from .space import ACTIVATIONS, KERNEL_SIZES, STRIDES, OpKey

_KEY = re.compile(r"MBInvertedResBlock_(\d+)_(\d+)_(\d+)_(\d+)_k(\d+)_s(\d+)_(\w+)")


def published_key(key: OpKey) -> str:
    """The published table's name of a curve: `MBInvertedResBlock_{hw}_{in}_{se}_{out}_k{k}_s{s}_{act}`."""
    return (
        f"MBInvertedResBlock_{key.resolution}_{key.in_channels}_{key.se_channels}_{key.out_channels}"
        f"_k{key.kernel_size}_s{key.stride}_{key.act}"
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
    key = OpKey(resolution, in_channels, out_channels, kernel_size, stride, se_channels, act=match[7])
    for what, value, allowed in (
        ("k", kernel_size, KERNEL_SIZES),
        ("s", stride, STRIDES),
        ("act", key.act, ACTIVATIONS),
    ):
        if value not in allowed:
            raise ValueError(
                f"published latency key {name}: {what} must be one of {', '.join(map(str, allowed))}, got {value}"
            )
    if min(resolution, in_channels, out_channels) < 1:
        raise ValueError(f"published latency key {name}: hw, in and out must be at least 1")
    return key
