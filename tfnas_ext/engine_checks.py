"""Checks of an engine's arguments that every engine makes; each names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from tfnas_ext.engine_spec import BodySpec


def check_widths(spec: BodySpec, widths: list[list[int]]) -> None:
    """ValueError unless `widths` has a width in 1..max_width (0 for the identity) for every candidate."""
    counts = [len(layer.candidates) for layer in spec.layers]
    if [len(row) for row in widths] != counts:
        raise ValueError(f"widths must have one row per layer with {counts} entries, not {[len(w) for w in widths]}")
    for index, (layer, row) in enumerate(zip(spec.layers, widths, strict=True)):
        for candidate, width in zip(layer.candidates, row, strict=True):
            if not min(1, candidate.max_width) <= width <= candidate.max_width:
                bounds = f"{min(1, candidate.max_width)}..{candidate.max_width}"
                raise ValueError(f"widths: layer {index}, {candidate.name} must be in {bounds}, not {width}")


def check_inputs(spec: BodySpec, x: Tensor, v: Tensor | None, u: Tensor | None = None) -> None:
    """ValueError unless `x`, `v` and, of a mixture, `u` have the body's shapes."""
    if x.dim() != 4 or x.shape[1] != spec.layers[0].in_channels:
        raise ValueError(f"x must be [N, {spec.layers[0].in_channels}, H, W], not {list(x.shape)}")
    shape = spec.depth_weights_shape
    if (None if v is None else tuple(v.shape)) != shape:
        raise ValueError(
            f"v must be {'None' if shape is None else list(shape)} for depth_space "
            f"{spec.depth_space!r}, not {None if v is None else list(v.shape)}"
        )
    expected = (len(spec.layers), spec.max_candidates)
    if u is not None and tuple(u.shape) != expected:
        raise ValueError(f"u must be [L, C] = {list(expected)}, not {list(u.shape)}")


def check_choices_shape(spec: BodySpec, choices: Tensor) -> None:
    """ValueError unless `choices` is [P, L] with one or two paths, TypeError unless it holds integers."""
    count = len(spec.layers)
    if choices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"choices must be int64, not {choices.dtype}")
    if choices.dim() != 2 or not 1 <= choices.shape[0] <= 2 or choices.shape[1] != count:
        raise ValueError(f"choices must be [P, L] with P = 1 or 2, L = {count}, not {list(choices.shape)}")


def read_choices(spec: BodySpec, choices: Tensor) -> list[list[int]]:
    """`choices` [P, L] as lists, read on the host. ValueError where an entry is no candidate of its layer."""
    layers = spec.layers
    check_choices_shape(spec, choices)
    rows: list[list[int]] = choices.tolist()
    for row in rows:
        for index, choice in enumerate(row):
            if not 0 <= choice < len(layers[index].candidates):
                raise ValueError(
                    f"choices: layer {index} has candidates 0..{len(layers[index].candidates) - 1}, not {choice}"
                )
    return rows
