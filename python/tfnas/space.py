"""The search space: what may be chosen in every layer, stage and width (paper, section 3.2, Table 1 and Fig. 3).

A `Space` is a plain, frozen description. It is read from YAML (`space_io`), printed, compared and hashed;
the supernet, the latency table, the scaling and every architecture file are derived from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

ACTIVATIONS = ("relu", "relu6", "swish", "hard_swish")
DEPTH_SPACES = ("sink", "skip-in", "skip-out")
KERNEL_SIZES = (3, 5, 7)
STRIDES = (1, 2)


def round_half_up(value: float) -> int:
    """Nearest integer, halves upwards (the rounding of Algorithm 1 here; Python's `round` goes to even)."""
    return math.floor(value + 0.5)


@dataclass(frozen=True, order=True)
class OpKey:
    """What decides a block's latency besides its width: one curve of the latency table per key."""

    resolution: int
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    se_channels: int
    act: str

    def __str__(self) -> str:
        return (
            f"mbinvres_r{self.resolution}_i{self.in_channels}_o{self.out_channels}"
            f"_k{self.kernel_size}_s{self.stride}_se{self.se_channels}_{self.act}"
        )


@dataclass(frozen=True)
class Candidate:
    """One operation of Table 1 (right): an MBInvRes with elastic width.

    `expansion` is the width at the start of the search as a multiple of the input channels; during the search the
    width stays within `[min_expansion, max_expansion]`. `se_expansion` times the input channels is the width of the
    squeeze-and-excitation bottleneck; 0 means no SE.
    """

    name: str
    kernel_size: int
    expansion: float
    min_expansion: float
    max_expansion: float
    se_expansion: float = 0.0

    @property
    def is_skip(self) -> bool:
        """Whether this is the identity of `depth_space: skip-in`: no width, no latency key, no parameters."""
        return self.name == SKIP.name


SKIP = Candidate("skip", kernel_size=0, expansion=0.0, min_expansion=0.0, max_expansion=0.0)


@dataclass(frozen=True)
class Stage:
    """A row of Table 1 (left) whose layers are searched: 1..depth layers, the first one with `stride`."""

    out_channels: int
    depth: int
    stride: int
    act: str


@dataclass(frozen=True)
class Layer:
    """One searchable layer of the supernet, with all shapes resolved. `resolution` is that of its input.

    Widths are in channels: `start_width` at the start of a search, `[min_width, max_width]` during it. All three are
    0 for the candidate `skip`, which has no `key`.
    """

    index: int
    stage: int
    position: int
    resolution: int
    in_channels: int
    out_channels: int
    stride: int
    act: str
    candidates: tuple[Candidate, ...]

    @property
    def has_residual(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def out_resolution(self) -> int:
        return -(-self.resolution // self.stride)

    def candidate_index(self, name: str) -> int:
        """Index of the candidate called `name` (`ValueError` where the layer has none)."""
        return [candidate.name for candidate in self.candidates].index(name)

    def start_width(self, candidate: int) -> int:
        width = round_half_up(self.candidates[candidate].expansion * self.in_channels)
        return min(max(width, self.min_width(candidate)), self.max_width(candidate))

    def min_width(self, candidate: int) -> int:
        # 1.1 * 50 is 55.00000000000001 in binary: not a reason to ask for a 12th channel
        return math.ceil(round(self.candidates[candidate].min_expansion * self.in_channels, 6))

    def max_width(self, candidate: int) -> int:
        return round_half_up(self.candidates[candidate].max_expansion * self.in_channels)

    def se_channels(self, candidate: int) -> int:
        return round_half_up(self.candidates[candidate].se_expansion * self.in_channels)

    def key(self, candidate: int) -> OpKey:
        op = self.candidates[candidate]
        if op.is_skip:
            raise ValueError(f"candidate 'skip' of layer {self.index} has no latency key: it costs nothing")
        return OpKey(
            self.resolution,
            self.in_channels,
            self.out_channels,
            op.kernel_size,
            self.stride,
            self.se_channels(candidate),
            self.act,
        )


@dataclass(frozen=True)
class Space:
    """A whole search space. Stage numbers start at `first_stage` = 3, as in Table 1 (1 and 2 are the fixed stem).

    `depth_space` decides how depth is searched (Fig. 3, Table 4): `sink` weighs the outputs of a stage's layers;
    `skip-in` adds `skip` as the last candidate of every layer but a stage's first; `skip-out` gives each of those
    layers a gate of its own. Layers after a stage's first keep its shape, so any of them can be left out.
    """

    name: str
    resolution: int
    image_channels: int
    num_classes: int
    stem_channels: int
    stem_stride: int
    stem_act: str
    fixed_channels: int
    fixed_se_channels: int
    stages: tuple[Stage, ...]
    candidates: tuple[Candidate, ...]
    head_channels: int
    head_act: str
    depth_space: str = "sink"

    first_stage = 3

    @property
    def stem_resolution(self) -> int:
        """Height and width after the stem, which is the input resolution of the first searchable layer."""
        return -(-self.resolution // self.stem_stride)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        layers: list[Layer] = []
        skippable = (*self.candidates, SKIP) if self.depth_space == "skip-in" else self.candidates
        resolution, channels = self.stem_resolution, self.fixed_channels
        for s, stage in enumerate(self.stages):
            for position in range(stage.depth):
                layer = Layer(
                    index=len(layers),
                    stage=s,
                    position=position,
                    resolution=resolution,
                    in_channels=channels,
                    out_channels=stage.out_channels,
                    stride=stage.stride if position == 0 else 1,
                    act=stage.act,
                    candidates=skippable if position > 0 else self.candidates,
                )
                layers.append(layer)
                resolution, channels = layer.out_resolution, layer.out_channels
        return tuple(layers)

    @cached_property
    def layers_of_stage(self) -> tuple[tuple[Layer, ...], ...]:
        return tuple(tuple(layer for layer in self.layers if layer.stage == s) for s in range(len(self.stages)))

    @property
    def out_resolution(self) -> int:
        return self.layers[-1].out_resolution

    @property
    def max_depth(self) -> int:
        """D, the second dimension of `log_beta [S, D]`."""
        return max(stage.depth for stage in self.stages)

    @property
    def max_candidates(self) -> int:
        """C, the second dimension of `log_alpha [L, C]`; a layer with fewer candidates lacks the last ones."""
        return max(len(layer.candidates) for layer in self.layers)

    @cached_property
    def keys(self) -> tuple[OpKey, ...]:
        """Every distinct latency curve of the space, in network order (66 for `imagenet`)."""
        return tuple(
            dict.fromkeys(
                layer.key(c)
                for layer in self.layers
                for c, candidate in enumerate(layer.candidates)
                if not candidate.is_skip
            )
        )
