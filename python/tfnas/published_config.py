"""The published code's `model.config`: a derived network as JSON, one dict of constructor arguments per layer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tfnas.architecture import Architecture, Op
from tfnas.fields import Fields, describe
from tfnas.files import read_json, write_text_atomically
from tfnas.published import ACT_FROM_PUBLISHED, ACT_TO_PUBLISHED
from tfnas.space import KERNEL_SIZES, STRIDES, Layer, Space, Stage
from tfnas.space_io import MAX_SIZE, TABLE_1, load_space

_CONV_CONSTANTS = {
    "groups": 1,
    "has_shuffle": False,
    "bias": False,
    "use_bn": True,
    "affine": True,
    "ops_order": "weight_bn_act",
}
_BLOCK_CONSTANTS = {"groups": 1, "has_shuffle": False, "bias": False, "use_bn": True, "affine": True}
_CLASSIFIER_CONSTANTS = {
    "bias": True,
    "use_bn": False,
    "affine": False,
    "act_func": None,
    "ops_order": "weight_bn_act",
}


def save_published_config(path: str | os.PathLike[str], arch: Architecture) -> None:
    """Write `to_published_config(arch)` as JSON, atomically."""
    write_text_atomically(path, json.dumps(to_published_config(arch), indent=4) + "\n")


def load_published_config(
    path: str | os.PathLike[str], *, space: Space | None = None, resolution: int = 224
) -> Architecture:
    """Read a `model.config` JSON file; see `from_published_config`. Errors (`ValueError`) name the file."""
    try:
        return from_published_config(read_json(path), space=space, resolution=resolution)
    except ValueError as error:
        raise ValueError(f"published model config {path}: {error}") from None


def to_published_config(arch: Architecture) -> dict[str, Any]:
    """The dict that the published code's `NetworkCfg` builds the network of `arch` from.

    Raises `ValueError` for a block no wider than its input, which that code would build without its expansion.
    """
    space = arch.space
    stages: dict[str, list[dict[str, Any]]] = {f"stage{s}": [] for s in range(1, len(space.stages) + 1)}
    for layer, op in arch.layers():
        if op.width <= layer.in_channels:
            raise ValueError(
                f"layer {layer.index}: the published code has no block with an expansion to {op.width} channels from "
                f"{layer.in_channels}; the width must exceed the input channels"
            )
        stages[f"stage{layer.stage + 1}"].append(
            _block_config(
                layer.in_channels,
                op.width,
                op.se_channels,
                layer.out_channels,
                kernel_size=op.kernel_size,
                stride=layer.stride,
                act=layer.act,
            )
        )
    return {
        "first_stem": _conv_config(
            space.image_channels, space.stem_channels, kernel_size=3, stride=space.stem_stride, act=space.stem_act
        ),
        "second_stem": _block_config(
            space.stem_channels,
            space.stem_channels,
            space.fixed_se_channels,
            space.fixed_channels,
            kernel_size=3,
            stride=1,
            act=space.stem_act,
        ),
        **stages,
        "feature_mix_layer": _conv_config(
            space.stages[-1].out_channels, space.head_channels, kernel_size=1, stride=1, act=space.head_act
        ),
        "classifier": {
            "name": "LinearLayer",
            "in_features": space.head_channels,
            "out_features": space.num_classes,
            **_CLASSIFIER_CONSTANTS,
        },
    }


def from_published_config(data: object, *, space: Space | None = None, resolution: int = 224) -> Architecture:
    """The architecture of a `model.config` dict, which may have more or fewer stages than the paper's six.

    Args:
        data: The parsed JSON.
        space: The search space it must belong to, classes and image channels aside. Without one it is `imagenet` where
            that fits, else a space of its own, as deep as the network, with Table 1's candidates.
        resolution: Image size, which the format does not hold; ignored where `space` is given.

    Raises:
        ValueError: Naming the key that is missing, unknown, contradictory or matches no candidate.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"expected a mapping of keys to values, got {describe(data)}")
    count = sum(re.fullmatch(r"stage\d+", str(key)) is not None for key in data)
    stage_keys = [f"stage{s}" for s in range(1, max(count, 1) + 1)]
    top = Fields(data, "", required=["first_stem", "second_stem", *stage_keys, "feature_mix_layer", "classifier"])
    blocks = [[_Block(item, path) for path, item in top.items(key)] for key in stage_keys]
    base = space if space is not None else load_space(TABLE_1, {"resolution": resolution})
    found = _macro(top, blocks, base)
    difference = _difference(found, base)
    if difference is None:
        found = replace(base, num_classes=found.num_classes, image_channels=found.image_channels)
    elif space is not None:
        raise ValueError(f"the network does not belong to search space {base.name!r}: {difference}")
    ops = [
        tuple(_op(block, layer) for block, layer in zip(stage, layers, strict=False))
        for stage, layers in zip(blocks, found.layers_of_stage, strict=True)
    ]
    return Architecture(found, tuple(ops))


def _conv_config(in_channels: int, out_channels: int, *, kernel_size: int, stride: int, act: str) -> dict[str, Any]:
    return {
        "name": "ConvLayer",
        "kernel_size": kernel_size,
        "stride": stride,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "act_func": ACT_TO_PUBLISHED[act],
        **_CONV_CONSTANTS,
    }


def _block_config(
    in_channels: int, width: int, se_channels: int, out_channels: int, *, kernel_size: int, stride: int, act: str
) -> dict[str, Any]:
    return {
        "name": "MBInvertedResBlock",
        "in_channels": in_channels,
        "mid_channels": width,
        "se_channels": se_channels,
        "out_channels": out_channels,
        "kernel_size": kernel_size,
        "stride": stride,
        "act_func": ACT_TO_PUBLISHED[act],
        **_BLOCK_CONSTANTS,
    }


def _constants(entry: Fields, name: str, constants: Mapping[str, object]) -> None:
    """Refuse a layer of another kind, or with an option (groups, shuffle, ...) that no network here has."""
    for key, expected in {"name": name, **constants}.items():
        value = entry.values[key]
        if type(value) is not type(expected) or value != expected:
            raise entry.fail(key, json.dumps(expected))


class _Block:
    """A checked `MBInvertedResBlock` entry."""

    def __init__(self, item: object, path: str) -> None:
        self.entry = Fields(item, path, required=list(_block_config(1, 1, 0, 1, kernel_size=3, stride=1, act="relu")))
        _constants(self.entry, "MBInvertedResBlock", _BLOCK_CONSTANTS)
        self.in_channels = self.entry.integer("in_channels", maximum=MAX_SIZE)
        self.width = self.entry.integer("mid_channels", maximum=MAX_SIZE)
        self.se_channels = self.entry.integer("se_channels", minimum=0, maximum=MAX_SIZE)
        self.out_channels = self.entry.integer("out_channels", maximum=MAX_SIZE)
        self.kernel_size = self.entry.integer_choice("kernel_size", KERNEL_SIZES)
        self.stride = self.entry.integer_choice("stride", STRIDES)
        self.act = ACT_FROM_PUBLISHED[self.entry.choice("act_func", ACT_FROM_PUBLISHED)]

    def expect(self, **expected: object) -> None:
        """Refuse values that contradict the blocks around this one; keywords are keys of the format."""
        for key, value in expected.items():
            if self.entry.values[key] != value:
                raise self.entry.fail(key, f"{value!r} as the blocks before it ask for")


def _convolution(top: Fields, key: str, kernel_size: int) -> Fields:
    template = _conv_config(1, 1, kernel_size=kernel_size, stride=1, act="relu")
    entry = Fields(top.values[key], key, required=list(template))
    _constants(entry, "ConvLayer", {**_CONV_CONSTANTS, "kernel_size": kernel_size})
    return entry


def _macro(top: Fields, blocks: list[list[_Block]], base: Space) -> Space:
    """The space exactly as deep as the network, with the candidates, resolution and depth space of `base`."""
    stem = _convolution(top, "first_stem", 3)
    fixed = _Block(top.values["second_stem"], "second_stem")
    channels = stem.integer("out_channels", maximum=MAX_SIZE)
    act = stem.choice("act_func", ACT_FROM_PUBLISHED)
    fixed.expect(in_channels=channels, mid_channels=channels, kernel_size=3, stride=1, act_func=act)
    channels = fixed.out_channels
    for stage in blocks:
        first = stage[0]
        for position, block in enumerate(stage):
            block.expect(in_channels=channels, out_channels=first.out_channels, act_func=ACT_TO_PUBLISHED[first.act])
            if position > 0:
                block.expect(stride=1)
            channels = block.out_channels
    head = _convolution(top, "feature_mix_layer", 1)
    classifier = Fields(
        top.values["classifier"], "classifier", required=["name", "in_features", "out_features", *_CLASSIFIER_CONSTANTS]
    )
    _constants(classifier, "LinearLayer", _CLASSIFIER_CONSTANTS)
    links = (
        (head, "in_channels", channels),
        (head, "stride", 1),
        (classifier, "in_features", head.values["out_channels"]),
    )
    for entry, key, expected in links:
        if entry.values[key] != expected:
            raise entry.fail(key, f"{expected!r} as the layer before it asks for")
    return Space(
        name="published",
        resolution=base.resolution,
        image_channels=stem.integer("in_channels", maximum=MAX_SIZE),
        num_classes=classifier.integer("out_features", maximum=MAX_SIZE),
        stem_channels=stem.integer("out_channels", maximum=MAX_SIZE),
        stem_stride=stem.integer_choice("stride", STRIDES),
        stem_act=ACT_FROM_PUBLISHED[act],
        fixed_channels=fixed.out_channels,
        fixed_se_channels=fixed.se_channels,
        stages=tuple(Stage(stage[0].out_channels, len(stage), stage[0].stride, stage[0].act) for stage in blocks),
        candidates=base.candidates,
        head_channels=head.integer("out_channels", maximum=MAX_SIZE),
        head_act=ACT_FROM_PUBLISHED[head.choice("act_func", ACT_FROM_PUBLISHED)],
        depth_space=base.depth_space,
    )


def _difference(found: Space, base: Space) -> str | None:
    """What keeps a network with the shapes of `found` out of `base`, or None."""
    for name in ("stem_channels", "stem_stride", "stem_act", "fixed_channels", "fixed_se_channels"):
        if getattr(found, name) != getattr(base, name):
            return f"{name} is {getattr(found, name)}, there {getattr(base, name)}"
    if len(found.stages) != len(base.stages):
        return f"it has {len(found.stages)} stages, there {len(base.stages)}"
    for s, (mine, theirs) in enumerate(zip(found.stages, base.stages, strict=True), start=1):
        if mine.depth > theirs.depth:
            return f"stage{s} has {mine.depth} layers, there at most {theirs.depth}"
        if mine != replace(theirs, depth=mine.depth):
            return f"stage{s} is {replace(mine, depth=theirs.depth)}, there {theirs}"
    for name in ("head_channels", "head_act"):
        if getattr(found, name) != getattr(base, name):
            return f"{name} is {getattr(found, name)}, there {getattr(base, name)}"
    return None


def _op(block: _Block, layer: Layer) -> Op:
    """The candidate that `block` is; of two that differ in their range of widths, one whose range holds it."""
    if block.width <= layer.in_channels:
        raise block.entry.fail("mid_channels", f"more than in_channels ({layer.in_channels}), so that it expands")
    fitting = [
        c
        for c, candidate in enumerate(layer.candidates)
        if (candidate.kernel_size, layer.se_channels(c)) == (block.kernel_size, block.se_channels)
        and block.width <= layer.max_width(c)
    ]
    if not fitting:
        known = ", ".join(
            f"{candidate.name}: k{candidate.kernel_size} se{layer.se_channels(c)} mid<={layer.max_width(c)}"
            for c, candidate in enumerate(layer.candidates)
            if not candidate.is_skip
        )
        raise ValueError(
            f"{block.entry.path}: no candidate has kernel_size {block.kernel_size}, se_channels {block.se_channels} "
            f"and mid_channels up to {block.width} (known: {known}); pass a search space with one that does"
        )
    within = [c for c in fitting if layer.min_width(c) <= block.width]
    return Op.of(layer, (within or fitting)[0], block.width)
